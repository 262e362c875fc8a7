# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One pair of axes: lines, bands, bars, and what is said of them."""

import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from torchao_masquant.figures.places import Kind
from torchao_masquant.figures.style import GUIDE, PAPER
from torchao_masquant.figures.ticks import columns_of, legible
from torchao_masquant.wording import amount

__all__ = ["BAR_LABEL", "Bar", "Panel"]

# Lines of more points than this have small markers, or none where they are hollow.
_MANY = 24

#: in letters, of the names of lying bars
BAR_LABEL = 36


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
        self.axis.set_title(legible(title, 100 // columns_of(self.axis)))
        self.axis.set_xlabel(legible(x) if x else "")
        if self.axis.get_subplotspec().is_first_col():
            self.axis.set_ylabel(legible(y, 36))

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
