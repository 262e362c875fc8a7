# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The packaged calibration and held-out examples, and the model's score on the latter.

Reading them needs neither an audio package nor scikit-learn.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from torchao_masquant.testing.digits.checkpoints import DATA
from torchao_masquant.testing.digits.examples import (
    Batch,
    TaskExamples,
    from_tensors,
)

CALIBRATION_SAMPLES = 128


class TaskScore(NamedTuple):
    """Score on one task.

    Attributes:
        accuracy: Fraction of the answers that are right, 0 to 1.
        cross_entropy: Mean of -log p(right answer), in nats.
    """

    accuracy: float
    cross_entropy: float


@cache
def load_examples(name: str) -> dict[str, TaskExamples]:
    """The packaged examples of each task: "heldout" or "calibration"."""
    return from_tensors(load_file(DATA / f"{name}.safetensors"))


def calibration_samples(count: int = CALIBRATION_SAMPLES) -> list[dict[str, Tensor]]:
    """Training examples for calibration: the model's keyword inputs, batch size one.

    Each is the prompt followed by the right answer's token (teacher forcing), without
    labels. Tasks take turns, so that any few of them cover text, vision and audio.

    Args:
        count: How many, at most 128.
    """
    if not 0 < count <= CALIBRATION_SAMPLES:
        raise ValueError(
            f"count must be between 1 and {CALIBRATION_SAMPLES}, got {count}"
        )
    tasks = [
        [batch.inputs for batch in examples.batches(1, append_answer=True)]
        for examples in load_examples("calibration").values()
    ]
    return [inputs for turn in zip(*tasks) for inputs in turn][:count]


def heldout() -> dict[str, TaskExamples]:
    """The held-out examples of each task."""
    return dict(load_examples("heldout"))


def _heldout_task(task: str) -> TaskExamples:
    examples = load_examples("heldout")
    if task not in examples:
        raise ValueError(f"unknown task {task!r}: expected one of {tuple(examples)}")
    return examples[task]


def heldout_batches(
    task: str, batch_size: int = 100, append_answer: bool = False
) -> Iterator[Batch]:
    """The held-out examples of one task, in order and in batches without padding.

    Args:
        task: "image", "audio", "both" or "text".
        batch_size: Examples per batch.
        append_answer: Let the right answer follow the prompt (teacher forcing).
    """
    return _heldout_task(task).batches(batch_size, append_answer)


def prompt(task: str, index: int = 0) -> dict[str, Tensor]:
    """Inputs of one held-out example without its answer, for ``model.generate()``.

    The model answers with one number and ends with ``<eos>``.
    """
    return _heldout_task(task).select(torch.tensor([index])).batch().inputs


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batch_size: int = 100,
    examples: Mapping[str, TaskExamples] | None = None,
) -> dict[str, TaskScore]:
    """Score a model on each task.

    Args:
        model: A thinker, possibly quantized or compiled.
        batch_size: Examples per forward pass.
        examples: What to score on; the held-out examples by default.
    """
    device = next(model.parameters()).device
    scores = {}
    for task, task_examples in (examples or load_examples("heldout")).items():
        right, loss = 0, 0.0
        for batch in task_examples.batches(batch_size):
            batch = batch.to(device)
            logits = model(**batch.inputs).logits[:, -1].float()
            right += int((logits.argmax(dim=-1) == batch.answer_ids).sum())
            loss += F.cross_entropy(logits, batch.answer_ids, reduction="sum").item()
        scores[task] = TaskScore(right / len(task_examples), loss / len(task_examples))
    return scores
