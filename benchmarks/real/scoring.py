# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Scores of a quantized copy, against what the dense model said once."""

import contextlib
import math
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from real.examples import IGNORED
from torchao_masquant.evaluation.token_scores import TokenScores, score_tokens

__all__ = ["Reference"]

Tasks = Mapping[str, Sequence[Mapping[str, Tensor]]]


@contextlib.contextmanager
def _last_tokens(model: Any, kept: list[Tensor], count: int) -> Iterator[None]:
    """Keep what the head reads of the last tokens, and let it read no others.

    Of a task's example only the answer is scored, and the head is a fifth of the model.
    """

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0][:, -count:])
        return (kept[-1], *args[1:])

    handle = model.lm_head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def _scored(labels: Tensor) -> int:
    """Tokens from the one that predicts the first label on."""
    columns = (labels != IGNORED).any(0).nonzero()
    return labels.shape[1] - max(int(columns.min()) - 1, 0)


@torch.no_grad()
def _call(model: Any, sample: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, logits and labels of the last tokens of one sample."""
    labels = sample["labels"]
    count = _scored(labels)
    kept: list[Tensor] = []
    with _last_tokens(model, kept, count):
        logits = model(**{n: v for n, v in sample.items() if n != "labels"}).logits
    return kept[0], logits, labels[:, -count:]


class Reference:
    """What the dense model says of the held-out data: its last hidden states.

    Its head makes the same logits of them again, in a hundredth of their memory.

    Args:
        model: the dense one.
        tasks: labelled samples of each task.
    """

    def __init__(self, model: Any, tasks: Tasks):
        self.tasks = tasks
        self._head = model.lm_head
        self.hidden = {
            task: [_call(model, sample)[0] for sample in samples]
            for task, samples in tasks.items()
        }

    @torch.no_grad()
    def score(self, model: Any) -> dict[str, dict[str, float]]:
        """Scores of each task, see :func:`_summary`."""
        scores = {}
        for task, samples in self.tasks.items():
            found = []
            for sample, hidden in zip(samples, self.hidden[task]):
                _, logits, labels = _call(model, sample)
                none = torch.zeros_like(labels, dtype=torch.bool)
                exact = self._head(hidden)
                found.append(score_tokens(logits, exact, labels, none, task))
            scores[task] = _summary(found)
        return scores


def _summary(found: Sequence[TokenScores]) -> dict[str, float]:
    """Means over tokens, and the standard error of the KL over examples.

    Returns:
        ``accuracy`` 0..1, ``loss`` in nats, ``agrees`` 0..1, ``kl`` to the dense model and
        ``kl_error`` in nats, ``dense_accuracy``, ``dense_loss`` and ``examples``.
    """
    sums: dict[str, list[float]] = {}
    for scores in found:
        assert scores.reference is not None
        target = scores.targets != IGNORED
        columns = {
            "accuracy": scores.right,
            "loss": scores.loss,
            "agrees": scores.reference.agrees,
            "kl": scores.reference.kl,
            "dense_accuracy": scores.reference.right,
            "dense_loss": scores.reference.loss,
        }
        # Tokens of one piece of prose depend on each other: an example is its mean.
        count = target.sum(1)
        for name, values in columns.items():
            means = values.double().mul(target).sum(1) / count
            sums.setdefault(name, []).extend(means.tolist())
    examples = len(sums["kl"])
    summary = {name: sum(values) / examples for name, values in sums.items()}
    spread = torch.tensor(sums["kl"], dtype=torch.float64).std().item()
    return summary | {"kl_error": spread / math.sqrt(examples), "examples": examples}
