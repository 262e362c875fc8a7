# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Panels as numbers for the SVG template: pixels instead of values."""

import math
from dataclasses import dataclass
from typing import Optional, Union

from torchao_masquant.report.chart import Band, Columns, Line, Panel
from torchao_masquant.report.scale import Scale, Tick, value_scale, x_scale, y_values
from torchao_masquant.report.wording import amount

__all__ = ["MARKERS", "PlacedMark", "PlacedPanel", "place"]

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 332, 8, 172

# Of the name of the x axis, where it has one.
_NAME_HEIGHT = 16

#: matplotlib's codes of markers to the ids of the page's symbols
MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle",
    "D": "diamond",
    "v": "down",
    "P": "plus",
    "X": "cross",
}

# Labels of places stand upright up to so many letters on the axis, else they are left
# out but for the titles of the marks.
_MOST_LETTERS = 44

# More points than this have small markers.
_MOST_POINTS = 60


@dataclass(frozen=True)
class PlacedMark:
    """A marker, or a bar's rectangle.

    Attributes:
        x, y: of the marker's middle, or the rectangle's upper left corner.
        width, height: of the rectangle.
    """

    x: str
    y: str
    title: str
    width: str = ""
    height: str = ""


@dataclass(frozen=True)
class PlacedSeries:
    """What one series is drawn with.

    Attributes:
        kind: "line", "band" or "columns".
        color, dash, width: of its look.
        marker: id of a symbol; "" for none.
        path: of the line or of the area.
        marks: its markers, or bars.
    """

    kind: str
    color: str
    dash: str
    width: float
    marker: str
    path: str
    marks: tuple[PlacedMark, ...]


@dataclass(frozen=True)
class PlacedPanel:
    """A panel in pixels.

    Attributes:
        panel: what it shows.
        description: of its content, for those who do not see it.
        x_ticks, y_ticks: (pixel, text) pairs.
    """

    panel: Panel
    description: str
    x_ticks: tuple[tuple[str, str], ...]
    y_ticks: tuple[tuple[str, str], ...]
    series: tuple[PlacedSeries, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def place(panel: Panel) -> PlacedPanel:
    """Find the pixels of everything in a panel."""
    y = value_scale(y_values(panel), panel.log, panel.y_range)
    x = x_scale(
        (
            item.x
            for series in panel.series
            for item in (series.points if isinstance(series, Line) else series.spans)
        ),
        panel.categories,
        panel.whole,
    )
    if (
        any(isinstance(series, Columns) for series in panel.series)
        and not panel.categories
    ):
        x = _with_room(x, 0.5)
    lines = [series for series in panel.series if isinstance(series, Line)]
    crowded = sum(len(line.points) for line in lines) > _MOST_POINTS
    return PlacedPanel(
        panel=panel,
        height=HEIGHT - (0 if panel.x_label else _NAME_HEIGHT),
        description=_description(panel),
        x_ticks=tuple((_x_at(tick), tick.text) for tick in _readable(x.ticks)),
        y_ticks=tuple(
            (_pixel(_BOTTOM - t.at * (_BOTTOM - _TOP)), t.text) for t in y.ticks
        ),
        series=tuple(_placed(series, x, y, crowded) for series in panel.series),
    )


def _with_room(scale: Scale, room: float) -> Scale:
    """As wide as the outermost bars."""
    wider = Scale(
        math.floor(scale.low + 0.5) - room, math.ceil(scale.high - 0.5) + room
    )
    ticks = []
    for tick in scale.ticks:
        at = wider.at(scale.low + tick.at * (scale.high - scale.low))
        if at is not None:
            ticks.append(Tick(tick.value, at, tick.text))
    return Scale(wider.low, wider.high, ticks=tuple(ticks))


def _readable(ticks: tuple[Tick, ...]) -> tuple[Tick, ...]:
    if sum(len(tick.text) for tick in ticks) <= _MOST_LETTERS:
        return ticks
    return tuple(Tick(tick.value, tick.at, str(i)) for i, tick in enumerate(ticks))[
        :: len(ticks) // 12 + 1
    ]


def _x_at(tick: Tick) -> str:
    return _pixel(_LEFT + tick.at * (_RIGHT - _LEFT))


def _pixel(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _point(
    x: float, y: float, x_axis: Scale, y_axis: Scale
) -> Optional[tuple[str, str]]:
    across, up = x_axis.at(x), y_axis.at(y)
    if across is None or up is None:
        return None
    return (
        _pixel(_LEFT + across * (_RIGHT - _LEFT)),
        _pixel(_BOTTOM - up * (_BOTTOM - _TOP)),
    )


def _placed(
    series: Union[Line, Band, Columns], x: Scale, y: Scale, crowded: bool
) -> PlacedSeries:
    look = series.look
    marks: list[PlacedMark] = []
    path = ""
    if isinstance(series, Line):
        joined = False
        for point in series.points:
            at = _point(point.x, point.y, x, y)
            if at is None:
                joined = False
                continue
            path += f"{'L' if joined else 'M'}{at[0]} {at[1]}"
            joined = True
            if look.marker:
                marks.append(PlacedMark(*at, point.title))
        if look.dash == "none":
            path = ""
    elif isinstance(series, Band):
        path = _area(series, x, y)
    else:
        # The width of a bar is 0.72 of the distance of two places.
        half = 0.36 * (_RIGHT - _LEFT) / (x.high - x.low)
        for span in series.spans:
            low, high = _point(span.x, span.low, x, y), _point(span.x, span.high, x, y)
            if low is None or high is None or span.low == span.high:
                continue
            marks.append(
                PlacedMark(
                    _pixel(float(low[0]) - half),
                    high[1],
                    span.title,
                    _pixel(2 * half),
                    _pixel(float(low[1]) - float(high[1])),
                )
            )
    return PlacedSeries(
        type(series).__name__.lower(),
        look.color,
        look.dash,
        look.width,
        MARKERS[look.marker] + _size(look.dash, crowded) if look.marker else "",
        path,
        tuple(marks),
    )


def _size(dash: str, crowded: bool) -> str:
    """What the id of a symbol of that size ends with."""
    if crowded:
        return "-small"
    # Without a line, the markers are all that there is to see.
    return "-large" if dash == "none" else ""


def _area(band: Band, x: Scale, y: Scale) -> str:
    """Closed outlines, one for each run of spans without a gap."""
    path = ""
    run: list[tuple[tuple[str, str], tuple[str, str]]] = []
    for span in (*band.spans, None):
        ends = None
        if span is not None:
            high, low = _point(span.x, span.high, x, y), _point(span.x, span.low, x, y)
            ends = None if high is None or low is None else (high, low)
        if ends is not None:
            run.append(ends)
            continue
        outline = [high for high, _ in run] + [low for _, low in reversed(run)]
        if outline:
            path += "M" + "L".join(f"{px} {py}" for px, py in outline) + "Z"
        run = []
    return path


def _description(panel: Panel) -> str:
    """Ends of each series in words."""
    parts = []
    for series in panel.series:
        if not series.name:
            continue
        if isinstance(series, Line):
            values = [p.y for p in series.points if math.isfinite(p.y)]
        else:
            values = [
                s.high - s.low for s in series.spans if math.isfinite(s.high - s.low)
            ]
        if not values:
            parts.append(f"{series.name} without values")
        elif min(values) == max(values):
            parts.append(f"{series.name} {amount(values[0])}")
        else:
            parts.append(
                f"{series.name} {amount(min(values))} to {amount(max(values))}"
            )
    by = f" by {panel.x_label}" if panel.x_label else ""
    return f"{panel.title}: {panel.y_label}{by}. {'; '.join(parts)}."
