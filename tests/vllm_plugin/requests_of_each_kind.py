# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Prompts and media that vLLM and transformers are asked the same."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Request", "requests"]

_WORDS = "what is this a red square and why not the other one here".split()


@dataclass(frozen=True)
class Request:
    """A prompt with images of 24 x 20, which are noise, in their order."""

    prompt: str
    seeds: tuple[int, ...]

    @property
    def images(self) -> list[Any]:
        return [
            Image.fromarray(
                np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
            )
            for seed in self.seeds
        ]


def requests(count: int, *, with_images: bool, image: str = "<image>") -> list[Request]:
    """Text; an image anywhere; two images; a long prefix that several have in common.

    Args:
        count: of them.
        with_images: or text alone.
        image: how a prompt says where an image is.
    """
    draw = random.Random(1)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))

    found = []
    for seed in range(count):
        kinds = ("text", "one", "one", "two", "shared") if with_images else ("text",)
        prompt, seeds = {
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
        }[draw.choice(kinds)]()
        found.append(Request(f"<start>user: {prompt}<end>\n<start>assistant: ", seeds))
    return found
