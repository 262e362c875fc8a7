# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The demonstration's table, for people."""

from typing import Sequence

from rich.table import Table

from torchao_masquant.demo.compare import Row
from torchao_masquant.evaluation.tables import new_table
from torchao_masquant.wording import method_name

__all__ = ["render"]


def render(rows: Sequence[Row], title: str) -> Table:
    """Lay the rows out: one line each, one section a scheme.

    Args:
        rows: the dense model first.
        title: above the table.
    """
    tasks = list(rows[0].accuracy)
    modalities = next((list(row.sqnr) for row in rows if row.sqnr), [])
    table = new_table(
        title,
        ["scheme", "method"],
        [
            f"accuracy, %\n{_line(tasks)}",
            f"cross-entropy, nats\n{_line(tasks)}",
            f"centred SQNR, dB\n{_line(modalities)}",
            "weights\nKiB",
            "time\ns",
        ],
    )
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(
            row.scheme,
            method_name(row.method) if row.method else "",
            _line([f"{100 * row.accuracy[task]:.1f}" for task in tasks]),
            _line([f"{row.cross_entropy[task]:.3f}" for task in tasks]),
            _line([f"{row.sqnr[m]:.1f}" for m in modalities]) if row.sqnr else "",
            f"{row.weight_bytes / 1024:.0f}",
            f"{row.seconds:.1f}" if row.method else "",
            end_section=following is None or following.scheme != row.scheme,
        )
    return table


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>5}" for cell in cells)
