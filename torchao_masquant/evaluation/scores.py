# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Sums over tokens, and the scores they make."""

import math
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch

from torchao_masquant.evaluation.evaluation import (
    ContentScore,
    ModalityScore,
    TaskScore,
)
from torchao_masquant.evaluation.token_scores import IGNORED, TokenScores

__all__ = ["ScoreSums"]


@dataclass
class _Sums:
    """Over the labelled tokens of some examples."""

    examples: int = 0
    right: int = 0
    reference_right: int = 0
    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    agreeing: int = 0
    kl: list[torch.Tensor] = field(default_factory=list)

    def add(self, scores: TokenScores, labelled: torch.Tensor) -> None:
        """Add examples.

        Args:
            labelled: (batch, sequence) bool, the tokens to count.
        """
        rows = labelled.any(1)
        self.examples += int(rows.sum())
        self.tokens += int(labelled.sum())
        self.right += int((scores.right | ~labelled).all(1)[rows].sum())
        self.loss += scores.loss[labelled].sum().item()
        if scores.reference is not None:
            reference = scores.reference
            self.reference_right += int(
                (reference.right | ~labelled).all(1)[rows].sum()
            )
            self.reference_loss += reference.loss[labelled].sum().item()
            self.agreeing += int(reference.agrees[labelled].sum())
            self.kl.append(reference.kl[labelled])


class ScoreSums:
    """Sums of all that an evaluation tells, over any number of calls.

    Args:
        modalities: names that modality ids index.
        has_reference: whether every call comes with a reference's scores.
    """

    def __init__(self, modalities: tuple[str, ...], has_reference: bool):
        self.modalities = modalities
        self.has_reference = has_reference
        self._tasks: dict[str, _Sums] = {}
        self._contents: dict[str, _Sums] = {}
        self._modality_tokens = [0] * len(modalities)
        self._modality_kl = [0.0] * len(modalities)

    def add(self, task: str, scores: TokenScores, ids: torch.Tensor) -> None:
        """Add one call.

        Args:
            task: that its examples belong to.
            scores: of its tokens.
            ids: (batch, sequence) int64 on the CPU, the tokens' modalities, negative
                for padding.
        """
        labelled = scores.targets != IGNORED
        self._tasks.setdefault(task, _Sums()).add(scores, labelled)
        contents = [self._content(row) for row in ids]
        for content in dict.fromkeys(contents):
            rows = torch.tensor([c == content for c in contents])
            self._contents.setdefault(content, _Sums()).add(
                scores, labelled & rows[:, None]
            )
        for index in range(len(self.modalities)):
            tokens = ids == index
            self._modality_tokens[index] += int(tokens.sum())
            if scores.reference is not None:
                self._modality_kl[index] += scores.reference.kl[tokens].sum().item()

    def _content(self, ids: torch.Tensor) -> str:
        return "+".join(m for i, m in enumerate(self.modalities) if (ids == i).any())

    def labelled_tokens(self, task: str) -> int:
        """How many labelled tokens a task has had so far."""
        return self._tasks[task].tokens if task in self._tasks else 0

    def tasks(self) -> dict[str, TaskScore]:
        """Score of each task, in the order in which they came."""
        return {task: self._task(sums) for task, sums in self._tasks.items()}

    def _task(self, sums: _Sums) -> TaskScore:
        if not self.has_reference:
            return TaskScore(
                sums.examples,
                sums.tokens,
                sums.right / sums.examples,
                sums.loss / sums.tokens,
            )
        kl = torch.cat(sums.kl)
        return TaskScore(
            sums.examples,
            sums.tokens,
            sums.right / sums.examples,
            sums.loss / sums.tokens,
            reference_accuracy=sums.reference_right / sums.examples,
            reference_cross_entropy=sums.reference_loss / sums.tokens,
            kl=kl.mean().item(),
            kl_p99=_high(kl),
            agreement=sums.agreeing / sums.tokens,
        )

    def by_modality(self) -> dict[str, ModalityScore]:
        """What was said at the tokens of each modality."""
        return {
            modality: ModalityScore(count, self._mean_kl(kl, count))
            for modality, count, kl in zip(
                self.modalities, self._modality_tokens, self._modality_kl
            )
        }

    def _mean_kl(self, total: float, count: int) -> Optional[float]:
        if not self.has_reference:
            return None
        return total / count if count else math.nan

    def by_content(self) -> dict[str, ContentScore]:
        """Score of the examples of each content that has labelled tokens."""
        return {
            content: ContentScore(
                sums.examples,
                sums.tokens,
                sums.loss / sums.tokens,
                sums.reference_loss / sums.tokens if self.has_reference else None,
            )
            for content, sums in sorted(
                self._contents.items(), key=lambda item: item[0].count("+")
            )
            if sums.tokens
        }


def _high(values: torch.Tensor) -> float:
    """The 0.99 quantile. torch.quantile refuses more than 2^24 values."""
    # Between two infinite values numpy finds nan, and warns.
    with np.errstate(invalid="ignore"):
        return float(np.quantile(values.numpy(), 0.99))
