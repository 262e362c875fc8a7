# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The demonstration's table, for people."""

from typing import Sequence

from rich import box
from rich.table import Table

from torchao_masquant.demo.compare import Row

__all__ = ["render"]

_LABELS = {
    "rtn": "round-to-nearest",
    "smoothquant": "SmoothQuant",
    "masquant-paper": "MASQuant, paper",
    "masquant": "MASQuant, ours",
}


def render(rows: Sequence[Row], title: str) -> Table:
    """Lay the rows out: one line each, one section a scheme.

    Args:
        rows: the dense model first.
        title: above the table.
    """
    tasks = list(rows[0].accuracy)
    modalities = next((list(row.sqnr) for row in rows if row.sqnr), [])
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("scheme", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading, names in (
        ("accuracy, %", tasks),
        ("cross-entropy, nats", tasks),
        ("centred SQNR, dB", modalities),
    ):
        table.add_column(f"{heading}\n{_line(names)}", justify="right", no_wrap=True)
    table.add_column("weights\nKiB", justify="right", no_wrap=True)
    table.add_column("time\ns", justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(
            row.scheme,
            _LABELS.get(row.method, row.method),
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
