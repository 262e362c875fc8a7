# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One model's memory and quality, and such rows from evaluations."""

import math
from dataclasses import dataclass, field
from typing import Optional, Sequence

from torchao_masquant.evaluation import Evaluation
from torchao_masquant.wording import method_name

__all__ = ["DENSE", "Row", "Rows", "rows_of_evaluations"]

#: scheme of a model that is not quantized
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One model, or the mean of several that differ in nothing but the seed.

    Attributes:
        scheme: its name, or "dense".
        method: its name, or "".
        accuracy: task to fraction of right answers, 0..1.
        cross_entropy: task to mean of -log p(right answer), in nats; empty where not
            measured, as are the next two.
        weight_bytes: of the linears' weights, with all that belongs to them; None where
            not known.
        sqnr: modality to mean centred SQNR over the linears, in dB.
        kl: task or modality to mean KL(dense || quantized), in nats.
        deviation: task to the standard deviation of the accuracy over the seeds; empty
            for one seed.
        examples: task to how many were asked; empty where not known.
        rank: of the pairs, in words; "" where it is the same for all rows.
        drawn: whether figures show it; tables show all.
    """

    scheme: str
    method: str
    accuracy: dict[str, float]
    cross_entropy: dict[str, float]
    weight_bytes: Optional[int]
    sqnr: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    rank: str = ""
    drawn: bool = True

    @property
    def label(self) -> str:
        """The method in words, with the rank."""
        name = method_name(self.method)
        return f"{name}, {self.rank}" if self.rank else name


@dataclass(frozen=True)
class Rows:
    """Models scored on the same data.

    Attributes:
        source: where they come from, for a heading.
        rows: the models.
        note: what has to be said beside their numbers.
    """

    source: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def dense(self) -> Optional[Row]:
        """The model before it was quantized; None where it was not scored."""
        return next((row for row in self.rows if row.scheme == DENSE), None)

    @property
    def quantized(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.scheme != DENSE)

    def names(self, attribute: str) -> list[str]:
        """Keys that any row has in a dictionary, in order of appearance."""
        return list(
            dict.fromkeys(key for row in self.rows for key in getattr(row, attribute))
        )

    @property
    def drawn(self) -> tuple[Row, ...]:
        """The quantized models that figures show."""
        return tuple(row for row in self.quantized if row.drawn)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.drawn))

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(row.scheme for row in self.drawn))


def rows_of_evaluations(
    evaluations: Sequence[tuple[str, Evaluation]],
) -> Optional[Rows]:
    """A row for each evaluation, after one for the reference of the first that has one.

    Args:
        evaluations: method and evaluation.

    Returns:
        None for no evaluations.
    """
    if not evaluations:
        return None
    rows = [_row(method, evaluation) for method, evaluation in evaluations]
    if not any(row.scheme == DENSE for row in rows):
        compared = [e for _, e in evaluations if e.reference_weight_bytes is not None]
        rows = [_reference_row(e) for e in compared[:1]] + rows
    return Rows("Evaluations", tuple(rows))


def _row(method: str, evaluation: Evaluation) -> Row:
    sqnr = {m: evaluation.mean_sqnr(m) for m in evaluation.modalities}
    tasks = evaluation.tasks
    return Row(
        scheme=evaluation.scheme or DENSE,
        method=method if evaluation.scheme else "",
        accuracy={task: score.accuracy for task, score in tasks.items()},
        cross_entropy={task: score.cross_entropy for task, score in tasks.items()},
        weight_bytes=evaluation.weight_bytes,
        sqnr={m: value for m, value in sqnr.items() if not math.isnan(value)},
        kl={task: s.kl for task, s in tasks.items() if s.kl is not None},
        examples={task: score.examples for task, score in tasks.items()},
    )


def _reference_row(evaluation: Evaluation) -> Row:
    tasks = evaluation.tasks.items()
    return Row(
        scheme=DENSE,
        method="",
        accuracy={
            task: s.reference_accuracy
            for task, s in tasks
            if s.reference_accuracy is not None
        },
        cross_entropy={
            task: s.reference_cross_entropy
            for task, s in tasks
            if s.reference_cross_entropy is not None
        },
        weight_bytes=evaluation.reference_weight_bytes or 0,
    )
