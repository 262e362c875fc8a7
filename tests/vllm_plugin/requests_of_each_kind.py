# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Prompts and media that vLLM and transformers are asked the same."""

import random
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from PIL import Image

__all__ = ["Request", "requests"]

_WORDS = "what is this a red square and why not the other one here".split()


@dataclass(frozen=True)
class Request:
    """A prompt with images of 24 x 20, which are noise, in their order, and sounds."""

    prompt: str
    seeds: tuple[int, ...]
    sound_seeds: tuple[int, ...] = ()

    @property
    def images(self) -> list[Any]:
        return [
            Image.fromarray(
                np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
            )
            for seed in self.seeds
        ]

    @property
    def sounds(self) -> list[Any]:
        """Noise of 0.2 to 0.6 s at 16 kHz."""
        return [
            np.random.default_rng(seed)
            .normal(0, 0.1, 3_200 * (1 + seed % 3))
            .astype(np.float32)
            for seed in self.sound_seeds
        ]

    @property
    def media(self) -> dict[str, list[Any]]:
        """By vLLM's names of them."""
        known = {"image": self.images, "audio": self.sounds}
        return {kind: found for kind, found in known.items() if found}


def requests(
    count: int,
    *,
    with_images: bool,
    image: str = "<image>",
    sound: Optional[str] = None,
) -> list[Request]:
    """Text; an image anywhere; two images; a long prefix that several have in common.

    Args:
        count: of them.
        with_images: or none.
        image: how a prompt says where an image is.
        sound: how it says where a sound is; None: there are none. With them, a sound
            anywhere; two sounds; an image and a sound.
    """
    draw = random.Random(1)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))

    found = []
    for seed in range(count):
        kinds = ("text", "one", "one", "two", "shared") if with_images else ("text",)
        if sound is not None:
            kinds += ("heard", "heard", "two heard")
            kinds += ("both",) if with_images else ()
        prompt, *seeds = {
            "text": lambda: (words(3, 20), ()),
            "one": lambda: (f"{words(0, 8)}{image}{words(1, 12)}", (seed,)),
            "two": lambda: (
                f"{image}{words(3, 3)}{image}{words(1, 5)}",
                (seed, -~seed),
            ),
            "shared": lambda: (
                f"a long start, over and over {image} and {words(1, 6)}",
                (count,),
            ),
            "heard": lambda: (f"{words(0, 8)}{sound}{words(1, 12)}", (), (seed,)),
            "two heard": lambda: (
                f"{sound}{words(1, 3)}{sound}{words(1, 5)}",
                (),
                (seed, -~seed),
            ),
            "both": lambda: (
                f"{words(0, 3)}{image}{words(0, 3)}{sound}{words(1, 5)}",
                (seed,),
                (seed,),
            ),
        }[draw.choice(kinds)]()
        found.append(Request(f"<start>user: {prompt}<end>\n<start>assistant: ", *seeds))
    return found
