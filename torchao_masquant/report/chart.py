# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a figure shows, whether it is drawn as SVG for the page or as PNG."""

from dataclasses import dataclass
from typing import Union

__all__ = [
    "Band",
    "BarPanel",
    "BarPart",
    "BarRow",
    "Columns",
    "Figure",
    "Line",
    "Look",
    "Panel",
    "Point",
    "Span",
]


@dataclass(frozen=True)
class Look:
    """How a series is drawn.

    Attributes:
        color: a name of :mod:`~torchao_masquant.report.palette`.
        marker: matplotlib's code of a marker; "" for none.
        dash: "solid", "dashed", "dotted", "dashdot", or "none": points alone.
        width: of the line, in pixels.
    """

    color: str
    marker: str = ""
    dash: str = "solid"
    width: float = 1.75


@dataclass(frozen=True)
class Point:
    """One value.

    Attributes:
        x, y: where; a value that is not finite leaves a gap.
        title: what the page says when it is pointed at.
    """

    x: float
    y: float
    title: str = ""


@dataclass(frozen=True)
class Span:
    """From ``low`` to ``high`` at ``x``."""

    x: float
    low: float
    high: float
    title: str = ""


@dataclass(frozen=True)
class Line:
    """Points, joined or not. A name of "" keeps it out of the legend."""

    name: str
    look: Look
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Band:
    """A shaded area between two lines."""

    name: str
    look: Look
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Columns:
    """Upright bars; stacked where each begins at the end of another's."""

    name: str
    look: Look
    spans: tuple[Span, ...]


Series = Union[Line, Band, Columns]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        y_label, x_label: what the axes count, with unit.
        series: drawn in this order.
        log: a logarithmic y axis, which leaves values out that are not positive.
        categories: names of the places 0, 1, ... on the x axis; () for numbers.
        whole: ticks of the x axis at whole numbers only, for layers.
        y_range: ends of the y axis; None for those of the values.
    """

    title: str
    y_label: str
    x_label: str
    series: tuple[Series, ...]
    log: bool = False
    categories: tuple[str, ...] = ()
    whole: bool = False
    y_range: Union[tuple[float, float], None] = None


@dataclass(frozen=True)
class BarPart:
    """A piece of a lying bar."""

    name: str
    color: str
    value: float
    title: str = ""


@dataclass(frozen=True)
class BarRow:
    """One lying bar, its pieces end to end.

    Attributes:
        label: in front of it.
        text: behind it.
    """

    label: str
    text: str
    parts: tuple[BarPart, ...]

    @property
    def total(self) -> float:
        return sum(part.value for part in self.parts)


@dataclass(frozen=True)
class BarPanel:
    """Lying bars that begin at zero; the texts behind them tell their lengths."""

    rows: tuple[BarRow, ...]

    @property
    def longest(self) -> float:
        return max((row.total for row in self.rows), default=0.0)


@dataclass(frozen=True)
class Figure:
    """Panels with one legend.

    Attributes:
        name: of its PNG file, without the ending, and its id in the page.
        title: heading.
        caption: one sentence that says how to read it.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Union[Panel, BarPanel], ...]

    @property
    def legend(self) -> "dict[str, tuple[str, Look]]":
        """Name to ("line", "band" or "columns", look), each once.

        A name looks the same in all panels.
        """
        found: dict[str, tuple[str, Look]] = {}
        for panel in self.panels:
            for name, kind, look in _entries(panel):
                if name:
                    found.setdefault(name, (kind, look))
        return found


def _entries(panel: Union[Panel, BarPanel]) -> list[tuple[str, str, Look]]:
    """Name, kind and look of all that is drawn in a panel."""
    if isinstance(panel, BarPanel):
        parts = [part for row in panel.rows for part in row.parts]
        return [(part.name, "columns", Look(part.color)) for part in parts]
    return [(s.name, type(s).__name__.lower(), s.look) for s in panel.series]
