# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory and quality of each scheme and method."""

from typing import Optional

from torchao_masquant.report.chart import (
    BarPanel,
    BarPart,
    BarRow,
    Figure,
    Line,
    Look,
    Panel,
    Point,
    Series,
)
from torchao_masquant.report.palette import INK, MUTED, method_look
from torchao_masquant.report.rows import DENSE, Row, Rows
from torchao_masquant.report.wording import byte_size, method_name, percent

__all__ = ["accuracy_figure", "memory_figure"]


def accuracy_figure(rows: Rows, suffix: str) -> Optional[Figure]:
    """Accuracy on each task by scheme and method.

    Args:
        rows: models scored on the same data.
        suffix: of the figure's name.

    Returns:
        None without a quantized model, or without a task.
    """
    tasks = rows.names("accuracy")
    if not rows.drawn or not tasks:
        return None
    return Figure(
        f"accuracy{suffix}",
        "Accuracy",
        "Each mark is one model, the dashed line the dense one: a mark far below it "
        "has gone blind or deaf to that task.",
        tuple(_panel(rows, task) for task in tasks),
    )


def _panel(rows: Rows, task: str) -> Panel:
    schemes, methods = rows.schemes, rows.methods
    series: list[Series] = []
    dense = rows.dense
    if dense is not None and task in dense.accuracy:
        level = 100 * dense.accuracy[task]
        ends = (-0.5, len(schemes) - 0.5)
        series.append(
            Line(
                "dense",
                Look(MUTED, "", "dashed", 1.25),
                tuple(Point(x, level) for x in ends),
            )
        )
    # Ours last, so that it lies on top.
    for method in sorted(methods, key=lambda m: m == "masquant"):
        # Beside each other: equal marks would hide each other.
        shift = 0.16 * (methods.index(method) - (len(methods) - 1) / 2)
        points = tuple(
            Point(
                schemes.index(row.scheme) + shift,
                100 * row.accuracy[task],
                f"{row.scheme}, {method_name(method)}: {percent(row.accuracy[task])}",
            )
            for row in rows.drawn
            if row.method == method and task in row.accuracy
        )
        look = method_look(method, methods)
        series.append(
            Line(
                method_name(method),
                Look(look.color, look.marker, "none"),
                points,
            )
        )
    return Panel(
        task,
        "right answers, %",
        "",
        tuple(series),
        categories=tuple(schemes),
        # Room for marks at both ends.
        y_range=(-4.0, 104.0),
    )


def memory_figure(rows: Rows, suffix: str) -> Optional[Figure]:
    """Bytes of the linears' weights, each different size once.

    Returns:
        None where no size is known.
    """
    dense = rows.dense
    sizes: dict[tuple[str, int], list[Row]] = {}
    for row in (*((dense,) if dense else ()), *rows.drawn):
        if row.weight_bytes is not None:
            sizes.setdefault((row.scheme, row.weight_bytes), []).append(row)
    bars = []
    for (scheme, size), group in sizes.items():
        names = list(dict.fromkeys(method_name(r.method) for r in group))
        label = scheme if scheme == DENSE else f"{scheme}: {', '.join(names)}"
        text = byte_size(size)
        if dense is not None and scheme != DENSE and dense.weight_bytes:
            text += f" ({percent(size / dense.weight_bytes, '.0f')})"
        ours = any(row.method == "masquant" for row in group)
        part = BarPart("", INK if ours else MUTED, size, f"{label}: {size} bytes")
        bars.append(BarRow(label, text, (part,)))
    if not bars:
        return None
    return Figure(
        f"memory{suffix}",
        "Memory",
        "The bytes of the decoder's linear weights with all that belongs to them"
        + (", and their share of the dense model's as it was held." if dense else "."),
        (BarPanel(tuple(bars)),),
    )
