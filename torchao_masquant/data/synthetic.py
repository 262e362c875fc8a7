# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Made-up conversations, to try a model with where there is no data.

Shapes, tones and sentences of a fixed vocabulary, the same at every call. They show
that everything runs, not how a model quantizes: real inputs have other ranges.
"""

from typing import Any, Sequence

import numpy as np

from torchao_masquant.data.parts import (
    AUDIO,
    IMAGE,
    TEXT,
    Conversation,
    Message,
    Part,
)

__all__ = ["synthetic_conversations"]

_COUNT = 16
_SIZE = 224
_RATE = 16_000
_SECONDS = 1.5

_COLORS = {"red": (220, 40, 40), "green": (40, 180, 70), "blue": (50, 80, 220)}
_NUMBERS = ("one", "two", "three", "four")
_WORDS = (
    "the a small large round square bright dark quiet loud picture sound line corner "
    "moves stands turns falls rises slowly quickly above below beside after before"
).split()


def synthetic_conversations(
    kinds: Sequence[str] = (IMAGE, AUDIO), count: int = _COUNT
) -> list[Conversation]:
    """Questions about made-up images and tones, with answers.

    Args:
        kinds: of media, "image" and "audio"; all of them in each sample, with a
            sentence of text.
        count: of samples.
    """
    return [_conversation(kinds, index) for index in range(count)]


def _conversation(kinds: Sequence[str], index: int) -> Conversation:
    generator = np.random.default_rng(index)
    color = list(_COLORS)[index % len(_COLORS)]
    number = 1 + index % len(_NUMBERS)
    parts, asked, answer = [], [], []
    if IMAGE in kinds:
        parts.append(Part(IMAGE, _image(generator, _COLORS[color], number)))
        asked.append("How many squares are there, and of which color?")
        answer.append(f"{_NUMBERS[number - 1]} {color}")
    if AUDIO in kinds:
        parts.append(Part(AUDIO, _tones(generator, number)))
        asked.append("How many tones do you hear?")
        answer.append(_NUMBERS[number - 1])
    words = " ".join(generator.choice(_WORDS, 24))
    asked.append(f"And which word is the last of these: {words}?")
    answer.append(words.split()[-1])
    parts.append(Part(TEXT, " ".join(asked)))
    return Conversation(
        where=f"synthetic sample {index}",
        messages=(
            Message("user", tuple(parts)),
            Message("assistant", (Part(TEXT, ", ".join(answer)),)),
        ),
    )


def _image(
    generator: np.random.Generator, color: Sequence[int], number: int
) -> np.ndarray:
    """Squares on a noisy gradient."""
    ramp = np.linspace(90, 200, _SIZE)
    pixels = np.repeat((ramp[:, None] + ramp[None, :])[..., None] / 2, 3, axis=2)
    pixels += generator.normal(0, 8, pixels.shape)
    for _ in range(number):
        top, left = generator.integers(0, _SIZE - 48, 2)
        pixels[top : top + 48, left : left + 48] = color
    return pixels.clip(0, 255).astype(np.uint8)


def _tones(generator: np.random.Generator, number: int) -> dict[str, Any]:
    """Tones one after the other, in a little noise."""
    each = int(_RATE * _SECONDS) // number
    time = np.arange(each) / _RATE
    tones = [
        np.sin(2 * np.pi * pitch * time) * np.hanning(each)
        for pitch in generator.uniform(200, 2000, number)
    ]
    sound = np.concatenate(tones)
    sound = 0.5 * sound + generator.normal(0, 0.01, sound.shape)
    return {"array": sound.astype(np.float32), "sampling_rate": _RATE}
