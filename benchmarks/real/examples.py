# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark's data: digits to see and hear, and prose, for calibration and held out."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from real.llm import load_tokenizer
from real.prompts import ANSWERS, TASKS, TEXT, prompt
from real.thinker import DATA
from torchao_masquant.testing.digits.examples import TaskExamples

__all__ = [
    "IGNORED",
    "Material",
    "calibration_samples",
    "heldout_samples",
    "heldout_size",
]

IGNORED = -100

#: Tokens of a piece of prose; SmolLM2 reads thirty times as many.
WINDOW = 256
#: Examples that run together.
BATCH = 32

# What a seed draws for calibration: of each task of one kind, of each of two, of prose.
_SINGLE, _DOUBLE, _PIECES = 96, 48, 16


@dataclass(frozen=True)
class Material:
    """What can be shown and said.

    Attributes:
        images: uint8 [n, 8, 8] with values 0..16.
        image_digits: int64 [n].
        log_mels: uint8 [m, 40, 64].
        clip_digits: int64 [m].
    """

    images: Tensor
    image_digits: Tensor
    log_mels: Tensor
    clip_digits: Tensor

    def examples(self, task: str, images: Tensor, clips: Tensor) -> TaskExamples:
        """Examples of a task.

        Args:
            task: of ``TASKS``.
            images: int64 [n], which images (not seen by "audio").
            clips: int64 [n], which clips (not heard by "image").
        """
        shown = task in ("image", "both, shown")
        digits = self.image_digits[images] if shown else self.clip_digits[clips]
        return TaskExamples(
            torch.tensor(prompt(task)).repeat(len(digits), 1),
            torch.tensor(ANSWERS)[digits],
            None if task == "audio" else self.images[images],
            None if task == "image" else self.log_mels[clips],
        )

    def draw(self, task: str, count: int, generator: torch.Generator) -> TaskExamples:
        """``count`` random examples of a task, drawn with replacement."""
        images = torch.randint(len(self.images), (count,), generator=generator)
        clips = torch.randint(len(self.log_mels), (count,), generator=generator)
        return self.examples(task, images, clips)


@cache
def _material(split: str) -> Material:
    return Material(**load_file(DATA / f"{split}.safetensors"))


@cache
def _prose(split: str) -> Tensor:
    """int64 [pieces, WINDOW]: a text cut into pieces, the rest left out."""
    text = (DATA / f"{split}.txt").read_text(encoding="utf-8")
    ids = load_tokenizer()(text).input_ids
    whole = len(ids) // WINDOW * WINDOW
    return torch.tensor(ids[:whole]).view(-1, WINDOW)


def _prose_sample(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calibration_samples(seed: int) -> list[dict[str, Tensor]]:
    """What one seed draws from the calibration data, prose and tasks by turns.

    Args:
        seed: of the draw; another draws other images, clips and pieces of prose.

    Returns:
        The model's keyword inputs, with the right answers after the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    material, prose = _material("calibration"), _prose("calibration")
    calls: list[list[dict[str, Tensor]]] = []
    for task in TASKS:
        count = _DOUBLE if task.startswith("both") else _SINGLE
        images = torch.randperm(len(material.images), generator=generator)[:count]
        clips = torch.randperm(len(material.log_mels), generator=generator)[:count]
        drawn = material.examples(task, images, clips)
        calls.append([b.inputs for b in drawn.batches(BATCH, append_answer=True)])
    pieces = prose[torch.randperm(len(prose), generator=generator)[:_PIECES]]
    calls.append([_prose_sample(ids) for ids in pieces.split(4)])
    longest = max(map(len, calls))
    return [c[turn] for turn in range(longest) for c in calls if turn < len(c)]


def _labelled(batch: Any) -> dict[str, Tensor]:
    """A batch whose last token, the answer, is the only one that is scored."""
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    labels[:, -1] = batch.inputs["input_ids"][:, -1]
    return {**batch.inputs, "labels": labels}


def heldout_samples(examples: int, pieces: int) -> dict[str, list[dict[str, Tensor]]]:
    """Labelled samples of each task and of prose, as ``evaluate`` takes them.

    Args:
        examples: of each task.
        pieces: of prose; every token of them but the first is scored.
    """
    material = _material("heldout")
    found: dict[str, list[dict[str, Tensor]]] = {}
    for task in TASKS:
        images = torch.arange(examples)
        # Another image with each clip than in the tasks of one kind.
        clips = images.roll(1) if task.startswith("both") else images
        drawn = material.examples(task, images, clips)
        found[task] = [_labelled(b) for b in drawn.batches(BATCH, append_answer=True)]
    prose = _prose("heldout")[:pieces]
    found[TEXT] = [
        {**_prose_sample(ids), "labels": ids.clone()} for ids in prose.split(4)
    ]
    return found


def heldout_size() -> tuple[int, int]:
    """How many examples of a task and pieces of prose are held out."""
    return len(_material("heldout").images), len(_prose("heldout"))
