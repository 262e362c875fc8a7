# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures as PNG, for slides and papers."""

from pathlib import Path
from typing import Any

from torchao_masquant.atomic_files import replacing
from torchao_masquant.report.chart import Band, BarPanel, Figure, Line, Look, Panel
from torchao_masquant.report.scale import value_scale, y_values

__all__ = ["write_png"]

# As what it is known again; see torchao_masquant.outputs.
_METADATA = {"Software": "torchao_masquant"}

_INCHES, _HEIGHT, _BAR_HEIGHT = 9.0, 2.7, 0.34
_MOST_COLUMNS = 3


def write_png(figure: Figure, path: Path, colors: dict[str, tuple[str, str]]) -> None:
    """Draw a figure on white and write it; a file of that name is replaced whole.

    Args:
        figure: what to draw.
        path: of the PNG file.
        colors: name to (light, dark); see :mod:`~torchao_masquant.report.palette`.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure as Canvas

    light = {name: value for name, (value, _) in colors.items()}
    count = len(figure.panels)
    # Four in a square, as on the page.
    columns = 2 if count == 4 else min(_MOST_COLUMNS, count)
    rows = -(-count // columns)
    height = _HEIGHT * rows
    first = figure.panels[0]
    if isinstance(first, BarPanel):
        height = 0.6 + _BAR_HEIGHT * len(first.rows)
    # Not from pyplot, whose figures live until they are closed.
    canvas = Canvas(figsize=(_INCHES, height + 0.8), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, figure.panels):
        if isinstance(panel, BarPanel):
            _draw_bars(axis, panel, light)
        else:
            _draw(axis, panel, light)
    for axis in axes[count:]:
        axis.set_visible(False)
    if figure.legend:
        canvas.legend(
            handles=_legend_handles(figure, light),
            loc="outside lower center",
            ncols=min(5, len(figure.legend)),
            frameon=False,
            fontsize=8,
        )
    canvas.suptitle(_plain(figure.title))
    with replacing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=150, metadata=_METADATA)


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _legend_handles(figure: Figure, light: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for name, (kind, look) in figure.legend.items():
        label, color = _plain(name), light[look.color]
        if kind == "line":
            handles.append(Line2D([], [], label=label, **_line_style(look, color)))
        else:
            handles.append(
                Patch(label=label, color=color, alpha=0.15 if kind == "band" else 1)
            )
    return handles


def _line_style(look: Look, color: str) -> dict[str, Any]:
    return {
        "color": color,
        "marker": look.marker or None,
        "linestyle": look.dash,
        "linewidth": look.width,
        "markersize": 5,
    }


def _draw(axis: Any, panel: Panel, light: dict[str, str]) -> None:
    axis.grid(True, alpha=0.25)
    axis.set_axisbelow(True)
    for series in panel.series:
        look = series.look
        color = light[look.color]
        if isinstance(series, Line):
            axis.plot(
                [point.x for point in series.points],
                [_shown(point.y, panel.log) for point in series.points],
                **_line_style(look, color),
            )
        else:
            x = [span.x for span in series.spans]
            low = [_shown(span.low, panel.log) for span in series.spans]
            high = [_shown(span.high, panel.log) for span in series.spans]
            if isinstance(series, Band):
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            else:
                heights = [h - lo for lo, h in zip(low, high)]
                axis.bar(x, heights, 0.72, bottom=low, color=color, edgecolor="w")
    if panel.log:
        axis.set_yscale("log")
    scale = value_scale(y_values(panel), panel.log, panel.y_range)
    axis.set_yticks([t.value for t in scale.ticks], [t.text for t in scale.ticks])
    axis.minorticks_off()
    axis.set_ylim(scale.low, scale.high)
    axis.set_title(_plain(panel.title), fontsize=9)
    axis.set_ylabel(_plain(panel.y_label), fontsize=8)
    axis.set_xlabel(_plain(panel.x_label), fontsize=8)
    axis.tick_params(labelsize=8)
    if panel.categories:
        places = range(len(panel.categories))
        axis.set_xticks(places, [_plain(name) for name in panel.categories], fontsize=7)
        axis.set_xlim(-0.5, len(panel.categories) - 0.5)
        if sum(map(len, panel.categories)) > 30:
            axis.tick_params(axis="x", rotation=30)
    elif panel.whole:
        from matplotlib.ticker import MaxNLocator

        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _shown(value: float, log: bool) -> float:
    return value if value > 0 or not log else float("nan")


def _draw_bars(axis: Any, panel: BarPanel, light: dict[str, str]) -> None:
    for index, row in enumerate(panel.rows):
        left = 0.0
        for part in row.parts:
            axis.barh(index, part.value, 0.7, left=left, color=light[part.color])
            left += part.value
        axis.text(left, index, f"  {_plain(row.text)}", va="center", fontsize=8)
    axis.set_yticks(range(len(panel.rows)), [_plain(row.label) for row in panel.rows])
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * panel.longest or 1.0)
    axis.xaxis.set_visible(False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
