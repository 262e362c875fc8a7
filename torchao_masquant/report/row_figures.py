# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory and quality of each scheme and method."""

from typing import Optional

from torchao_masquant.figures.drawing import Drawing, drawing
from torchao_masquant.figures.panel import BAR_LABEL, Bar, Panel, legible
from torchao_masquant.figures.style import INK, MUTED, method_look
from torchao_masquant.report.rows import DENSE, Row, Rows
from torchao_masquant.wording import byte_size, method_name, percent

__all__ = ["accuracy_figure", "bar_figure", "memory_figure"]


def accuracy_figure(rows: Rows, suffix: str) -> Optional[Drawing]:
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
    with drawing(
        f"accuracy{suffix}",
        "Accuracy",
        "Each mark is one model, the dashed line the dense one: a mark far below it "
        "has gone blind or deaf to that task.",
        len(tasks),
    ) as found:
        for panel, task in zip(found.panels, tasks):
            _draw(panel, rows, task)
    return found


def _draw(panel: Panel, rows: Rows, task: str) -> None:
    schemes, methods = rows.schemes, rows.methods
    if rows.dense is not None and task in rows.dense.accuracy:
        panel.guide("dense", 100 * rows.dense.accuracy[task])
    # Ours last, so that it lies on top.
    for method in sorted(methods, key=lambda m: m == "masquant"):
        # Beside each other: equal marks would hide each other.
        shift = 0.16 * (methods.index(method) - (len(methods) - 1) / 2)
        scored = [r for r in rows.drawn if r.method == method and task in r.accuracy]
        panel.line(
            method_name(method),
            [schemes.index(row.scheme) + shift for row in scored],
            [100 * row.accuracy[task] for row in scored],
            [
                f"{r.scheme}, {method_name(method)}: {percent(r.accuracy[task])}"
                for r in scored
            ],
            **{**method_look(method, methods), "linestyle": "none", "markersize": 6},
        )
    panel.name(task, "right answers, %")
    panel.categories(schemes)
    # Room for marks at both ends.
    low, high = panel.axis.get_ylim()
    panel.axis.set_ylim(min(low, -4), max(high, 104))


def memory_figure(rows: Rows, suffix: str) -> Optional[Drawing]:
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
        part = "", size, INK if ours else MUTED, f"{label}: {size} bytes"
        bars.append(Bar(label, text, [part]))
    return bar_figure(
        f"memory{suffix}",
        "Memory",
        "The bytes of the decoder's linear weights with all that belongs to them"
        + (", and their share of the dense model's as it was held." if dense else "."),
        bars,
    )


def bar_figure(
    name: str, title: str, caption: str, bars: list[Bar]
) -> Optional[Drawing]:
    """A figure of lying bars; None without bars."""
    if not bars:
        return None
    lines = max(len(legible(bar.label, BAR_LABEL).splitlines()) for bar in bars)
    height = 0.2 + max(0.32, 0.16 * lines) * len(bars)
    with drawing(name, title, caption, height=height) as found:
        found.panels[0].lying(bars)
    return found
