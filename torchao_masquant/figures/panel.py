# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One pair of axes: lines, bands, bars, and what is said of them."""

import math
import re
import textwrap
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from torchao_masquant.figures.places import Kind
from torchao_masquant.figures.style import GUIDE, PAPER
from torchao_masquant.wording import amount

__all__ = ["BAR_LABEL", "Bar", "Panel", "legible", "plain"]

# Lines of more points than this have small markers, or none where they are hollow.
_MANY = 24

# Of the names under all axes of a row: more letters than these slant, longer names are
# cut, and of more names not each is told.
_UPRIGHT, _LONGEST, _MOST = 90, 24, 24

#: in letters, of the names of lying bars
BAR_LABEL = 36

# Characters that no XML file may hold.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def plain(text: str) -> str:
    """Whatever a file says, without characters that no figure can hold."""
    return _NO_TEXT.sub("\ufffd", text)


def legible(text: str, width: int = 48) -> str:
    """Text that can be drawn, in lines of some letters."""
    return textwrap.fill(plain(text), width) or " "


@dataclass
class Bar:
    """One lying bar.

    Attributes:
        label: in front of it.
        text: behind it.
        parts: name ("" keeps it out of the legend), length, colour and what is said
            when it is pointed at, of its pieces, end to end.
    """

    label: str
    text: str
    parts: Sequence[tuple[str, float, str, str]]


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        axis: matplotlib's.
        log: whether its y axis is logarithmic: what is not positive leaves a gap.
        legend: label to artist.
        hints: an artist, and what each of its marks says when it is pointed at.
        said: the values in words, for those who do not see them.
        tops: where the bars at each place of the x axis end.
    """

    axis: Any
    log: bool = False
    legend: dict[str, Any] = field(default_factory=dict)
    hints: list[tuple[Any, list[str]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    tops: dict[float, float] = field(default_factory=dict)

    def name(self, title: str, y: str, x: str = "") -> None:
        """Title and axes, with their units; panels of one row share the y axis's name."""
        self.axis.set_title(legible(title, 100 // self._columns))
        self.axis.set_xlabel(legible(x) if x else "")
        if self.axis.get_subplotspec().is_first_col():
            self.axis.set_ylabel(legible(y, 36))

    @property
    def _columns(self) -> int:
        """How many panels there are in a row."""
        return self.axis.get_subplotspec().get_gridspec().ncols

    def _shown(self, values: Sequence[float]) -> list[float]:
        """Values that have a place on the y axis, and nan for the others."""
        return [
            v if math.isfinite(v) and (v > 0 or not self.log) else math.nan
            for v in values
        ]

    def _say(self, label: str, values: Sequence[float]) -> None:
        known = [v for v in values if math.isfinite(v)]
        if label and values:
            ends = [amount(end) for end in (min(known), max(known))] if known else []
            self.said.append(
                f"{label} {' to '.join(dict.fromkeys(ends)) or 'without values'}"
            )

    def line(
        self,
        label: str,
        x: Sequence[float],
        y: Sequence[float],
        hints: Sequence[str] = (),
        **look: Any,
    ) -> None:
        """Points, joined or not.

        Args:
            label: in the legend; "" keeps it out.
            x, y: where; a value that is not finite leaves a gap.
            hints: what each point says when it is pointed at; () for nothing.
            look: arguments of ``Axes.plot``.
        """
        x, y = [v if math.isfinite(v) else math.nan for v in x], self._shown(y)
        if len(x) > _MANY:
            look = {"markersize": 2.5, **look}
            if look.get("markerfacecolor") == "none":
                look["marker"] = ""
        (artist,) = self.axis.plot(x, y, **look)
        if label:
            self.legend[label] = artist
        kept = [hint for hint, *at in zip(hints, x, y) if not any(map(math.isnan, at))]
        # Without markers there is nothing to point at.
        if kept and look.get("marker"):
            self.hints.append((artist, kept))
        self._say(label, y)

    def guide(self, label: str, y: float) -> None:
        """A level line that others are compared with."""
        shown = self._shown([y])
        self.legend[label] = self.axis.axhline(*shown, **GUIDE)
        self._say(label, shown)

    def by_layer(
        self,
        kind: Kind,
        label: str,
        points: Mapping[str, tuple[float, str]],
        **look: Any,
    ) -> None:
        """A line over the layers.

        Args:
            kind: of the linears.
            label: in the legend.
            points: linear, of this kind or another, to its value and what it says.
            look: arguments of ``Axes.plot``.
        """
        found = [
            (place, *points[name]) for place, name in kind.places if name in points
        ]
        self.line(
            label,
            [place for place, _, _ in found],
            [value for _, value, _ in found],
            [f"{kind.place_name(place)}, {label}: {said}" for place, _, said in found],
            **look,
        )

    def band(
        self, kind: Kind, ends: Mapping[str, tuple[float, float]], color: str
    ) -> None:
        """An area over the layers, from one value of each linear to another."""
        found = [(place, *ends[name]) for place, name in kind.places if name in ends]
        self.axis.fill_between(
            [place for place, _, _ in found],
            self._shown([low for _, low, _ in found]),
            self._shown([high for _, _, high in found]),
            color=color,
            alpha=0.14,
            linewidth=0,
        )

    def stack(
        self, kind: Kind, label: str, parts: Mapping[str, tuple[float, str]], color: str
    ) -> None:
        """Upright bars over the layers, on top of those before; see :meth:`by_layer`."""
        found = [(place, *parts[name]) for place, name in kind.places if name in parts]
        heights = [value if math.isfinite(value) else 0.0 for _, value, _ in found]
        bars = self.axis.bar(
            [place for place, _, _ in found],
            heights,
            0.72,
            bottom=[self.tops.get(place, 0.0) for place, _, _ in found],
            color=color,
            edgecolor=PAPER,
            linewidth=0.5,
        )
        self.legend[label] = bars
        for (place, _, said), bar, height in zip(found, bars, heights):
            self.tops[place] = self.tops.get(place, 0.0) + height
            hint = f"{kind.place_name(place)}, {label}: {said}"
            self.hints.append((bar, [hint]))
        self._say(label, heights)

    def lying(self, bars: Sequence[Bar]) -> None:
        """Lying bars that begin at zero; the texts behind them tell their lengths."""
        for index, bar in enumerate(bars):
            left = 0.0
            for label, value, color, hint in bar.parts:
                (drawn,) = self.axis.barh(
                    index, value, 0.6, left=left, color=color, edgecolor=PAPER
                )
                left += value
                self.hints.append((drawn, [hint]))
                if label:
                    self.legend.setdefault(label, drawn)
            self.axis.annotate(
                legible(bar.text),
                (left, index),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
            self.said.append(f"{bar.label} {bar.text}")
        labels = [legible(bar.label, BAR_LABEL) for bar in bars]
        self.axis.set_yticks(range(len(bars)), labels)
        self.axis.set_ylim(len(bars) - 0.4, -0.6)
        longest = max(sum(value for _, value, _, _ in bar.parts) for bar in bars)
        self.axis.set_xlim(0, 1.25 * longest or 1.0)
        self.axis.xaxis.set_visible(False)
        self.axis.grid(False)
        self.axis.spines["bottom"].set_visible(False)

    def categories(self, names: Sequence[str]) -> None:
        """Names at the places 0, 1, ... of the x axis."""
        labels = [
            name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
            for name in names
        ]
        step = -(-len(labels) // max(1, _MOST // self._columns))
        self.axis.set_xticks(
            range(0, len(labels), step), [legible(label) for label in labels[::step]]
        )
        self.axis.set_xlim(-0.5, len(labels) - 0.5)
        self.axis.grid(False, axis="x")
        if sum(map(len, labels[::step])) > _UPRIGHT // self._columns:
            self.axis.tick_params(axis="x", labelrotation=30)
            for text in self.axis.get_xticklabels():
                text.set_ha("right")

    def layers(self) -> None:
        """Whole numbers on the x axis."""
        from matplotlib.ticker import MaxNLocator

        self.axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    def log_ticks(self) -> None:
        """A logarithmic y axis whose ticks are numbers."""
        from matplotlib.ticker import (
            FuncFormatter,
            LogLocator,
            MaxNLocator,
            NullLocator,
        )

        self.axis.set_yscale("log")
        low, high = self.axis.get_ylim()
        if not 0 < low < high:
            # There is no value at all.
            self.axis.set_ylim(low := 1.0, high := 10.0)
        decades = math.log10(high / low)
        subs = (
            (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 3 else (1.0,)
        )
        locator: Any = LogLocator(subs=subs, numticks=7)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
            # On a short axis, values are all but evenly spaced.
            locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        self.axis.yaxis.set_major_locator(locator)
        self.axis.yaxis.set_minor_locator(NullLocator())
        self.axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
