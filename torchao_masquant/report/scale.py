# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ends and ticks of an axis; where to put ticks is matplotlib's knowledge."""

import math
from dataclasses import dataclass, replace
from typing import Iterable, Optional, Sequence

from torchao_masquant.report.chart import Line, Panel, Point

__all__ = ["Scale", "Tick", "share_y_range", "value_scale", "x_scale", "y_values"]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        value: that stands there.
        at: 0..1 from the axis's beginning to its end.
    """

    value: float
    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low, high: its ends.
        log: whether it is logarithmic.
        ticks: in order.
    """

    low: float
    high: float
    log: bool = False
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> Optional[float]:
        """Place of a value, 0..1 between the ends; None where it has none."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def value_scale(
    values: Iterable[float],
    log: bool = False,
    ends: Optional[tuple[float, float]] = None,
) -> Scale:
    """The y axis of some values.

    Args:
        values: to show.
        log: logarithmic.
        ends: to use in place of the values'.
    """
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = ends or (min(shown, default=1.0), max(shown, default=1.0))
    if log:
        low, high = (low / 1.25, high * 1.25) if ends is None else (low, high)
        return _with_ticks(Scale(low, high, log=True), _log_ticks(low, high))
    if ends is None:
        room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
        low, high = low - room, high + room
    return _with_ticks(Scale(low, high), _linear_ticks(low, high, 5, whole=False))


def y_values(panel: Panel) -> list[float]:
    """All values that a panel shows on its y axis."""
    return [
        value
        for series in panel.series
        for item in (series.points if isinstance(series, Line) else series.spans)
        for value in ([item.y] if isinstance(item, Point) else [item.low, item.high])
    ]


def share_y_range(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """The same panels on one linear y axis, so that they can be compared."""
    scale = value_scale(v for panel in panels for v in y_values(panel))
    return tuple(replace(panel, y_range=(scale.low, scale.high)) for panel in panels)


def x_scale(values: Iterable[float], categories: tuple[str, ...], whole: bool) -> Scale:
    """The x axis of some values; see :class:`~torchao_masquant.report.chart.Panel`."""
    if categories:
        scale = Scale(-0.5, len(categories) - 0.5)
        ticks = tuple(
            Tick(index, scale.at(index) or 0.0, name)
            for index, name in enumerate(categories)
        )
        return Scale(scale.low, scale.high, ticks=ticks)
    shown = [v for v in values if math.isfinite(v)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    room = 0.5 if low == high else 0.04 * (high - low)
    return _with_ticks(
        Scale(low - room, high + room),
        _linear_ticks(low - room, high + room, 6, whole),
    )


def _with_ticks(scale: Scale, ticks: list[float]) -> Scale:
    placed = tuple(
        Tick(tick, at, f"{tick:.6g}".replace("-", "−"))
        for tick in ticks
        if (at := scale.at(tick)) is not None and -1e-9 <= at <= 1 + 1e-9
    )
    return Scale(scale.low, scale.high, scale.log, placed)


def _linear_ticks(low: float, high: float, most: int, whole: bool) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=most, integer=whole, steps=[1, 2, 2.5, 5, 10])
    # Not -0.0 and 1e-17, which would be written so.
    step = high - low
    return [
        0.0 if abs(t) < 1e-9 * step else float(t)
        for t in locator.tick_values(low, high)
    ]


def _log_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import LogLocator

    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 3 else (1.0,)
    found = [float(t) for t in LogLocator(subs=subs, numticks=7).tick_values(low, high)]
    if sum(low <= t <= high for t in found) > 2:
        return found
    # A short axis: its values are all but evenly spaced.
    return _linear_ticks(low, high, 5, whole=False)
