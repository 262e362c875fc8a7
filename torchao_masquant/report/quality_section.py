# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory and quality of each scheme and method, for each source of rows."""

from typing import Optional

from torchao_masquant.report.headline import NOTICED, fell
from torchao_masquant.report.row_figures import accuracy_figure, memory_figure
from torchao_masquant.report.rows import Row, Rows
from torchao_masquant.report.section import Cell, Section, Table
from torchao_masquant.wording import (
    MISSING,
    amount,
    byte_size,
    points,
)

__all__ = ["quality_section"]


def quality_section(rows: Rows, name: str) -> Section:
    """A section.

    Args:
        rows: models scored on the same data.
        name: id of the section, and end of its figures' names.
    """
    suffix = "" if name == "evaluations" else f"_{name}"
    return Section.of(
        name,
        "Memory and quality" if name == "evaluations" else rows.source,
        "What each scheme and method keeps of the dense model, and what it weighs.",
        (accuracy_figure(rows, suffix), memory_figure(rows, suffix)),
        (_table(rows),),
        (rows.note,),
    )


def _table(rows: Rows) -> Table:
    tasks, losses = rows.names("accuracy"), rows.names("cross_entropy")
    modalities, divergences = rows.names("sqnr"), rows.names("kl")
    dense = rows.dense
    return Table(
        f"{rows.source}. In bold: more than {100 * NOTICED:.0f} points below the dense model",
        [
            ("", ["scheme and method"]),
            ("right answers, %", tasks),
            ("", ["weights"]),
            ("centred SQNR, dB", modalities),
            ("KL to dense, nats", divergences),
            ("cross-entropy, nats", losses),
        ],
        [
            [
                Cell(row.scheme, note="" if row is dense else row.label),
                *(_accuracy(row, dense, task) for task in tasks),
                _memory(row),
                *(amount(row.sqnr.get(m), ".1f") for m in modalities),
                *(_divergence(row.kl.get(name)) for name in divergences),
                *(amount(row.cross_entropy.get(task), ".3f") for task in losses),
            ]
            for row in rows.rows
        ],
    )


def _accuracy(row: Row, dense: Optional[Row], task: str) -> Cell:
    if task not in row.accuracy:
        return Cell(MISSING)
    value = row.accuracy[task]
    text = amount(100 * value, ".1f")
    if task in row.deviation:
        text += f" ± {amount(100 * row.deviation[task], '.1f')}"
    if dense is None or row is dense or task not in dense.accuracy:
        return Cell(text)
    before = dense.accuracy[task]
    tone = "bad" if fell(value, before) else ""
    return Cell(text, tone, points(value - before))


def _memory(row: Row) -> Cell:
    size = row.weight_bytes
    return Cell(byte_size(size), title="not known" if size is None else f"{size} bytes")


def _divergence(value: Optional[float]) -> Cell:
    if value is not None and 0 < value < 5e-5:
        return Cell("< 0.0001", title=f"{value:.2g} nats")
    return Cell(amount(value, ".4f"))
