# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a figure is made of: panels with lines, bands and bars, and one legend."""

import math
import re
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, Sequence, Union

from torchao_masquant.figures.places import Kind
from torchao_masquant.figures.style import GUIDE, PAPER, styled
from torchao_masquant.wording import amount

__all__ = ["Bar", "Drawing", "Panel", "by_kind", "drawing", "plain"]

# In inches.
_WIDTH, _HEIGHT = 9.0, 2.4

# Lines of more points than this have small markers, or none where they are hollow.
_MANY = 24

# Of the names under an axis: more letters than these slant, longer ones are cut, and
# of more names not each is told.
_UPRIGHT, _LONGEST, _MOST = 30, 24, 16

# Characters that no XML file may hold.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def plain(text: str) -> str:
    """Whatever a file says, without characters that no figure can hold."""
    return _NO_TEXT.sub("\ufffd", text)


def _legible(text: str, width: int = 48) -> str:
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
    """

    axis: Any
    log: bool = False
    legend: dict[str, Any] = field(default_factory=dict)
    hints: list[tuple[Any, list[str]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def name(self, title: str, y: str, x: str = "") -> None:
        """Title and axes, with their units; panels of one row share the y axis's name."""
        spec = self.axis.get_subplotspec()
        columns = spec.get_gridspec().ncols
        self.axis.set_title(_legible(title, 100 // columns))
        self.axis.set_xlabel(_legible(x) if x else "")
        if spec.is_first_col():
            self.axis.set_ylabel(_legible(y, 36))

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
                look, hints = {**look, "marker": ""}, ()
        (artist,) = self.axis.plot(x, y, **look)
        if label:
            self.legend[label] = artist
        kept = [hint for hint, *at in zip(hints, x, y) if not any(map(math.isnan, at))]
        if kept:
            self.hints.append((artist, kept))
        self._say(label, y)

    def guide(self, label: str, y: float) -> None:
        """A level line that others are compared with."""
        self.legend[label] = self.axis.axhline(y, **GUIDE)
        self._say(label, [y])

    def band(
        self,
        x: Sequence[float],
        low: Sequence[float],
        high: Sequence[float],
        color: str,
    ) -> None:
        """A shaded area between two lines."""
        low, high = self._shown(low), self._shown(high)
        self.axis.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)

    def bars(
        self,
        label: str,
        x: Sequence[float],
        heights: Sequence[float],
        bottoms: Sequence[float],
        hints: Sequence[str],
        color: str,
    ) -> None:
        """Upright bars; stacked where each begins at the end of another's."""
        found = self.axis.bar(
            x,
            heights,
            0.72,
            bottom=bottoms,
            color=color,
            edgecolor=PAPER,
            linewidth=0.5,
        )
        self.legend[label] = found
        self.hints += [(bar, [hint]) for bar, hint in zip(found, hints)]
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
                _legible(bar.text),
                (left, index),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
            self.said.append(f"{bar.label} {bar.text}")
        labels = [_legible(bar.label, 36) for bar in bars]
        self.axis.set_yticks(range(len(bars)), labels)
        self.axis.invert_yaxis()
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
        step = -(-len(labels) // _MOST)
        self.axis.set_xticks(
            range(0, len(labels), step), [_legible(label) for label in labels[::step]]
        )
        self.axis.set_xlim(-0.5, len(labels) - 0.5)
        self.axis.grid(False, axis="x")
        if sum(map(len, labels[::step])) > _UPRIGHT:
            self.axis.tick_params(axis="x", labelrotation=30)
            for text in self.axis.get_xticklabels():
                text.set_ha("right")

    def layers(self) -> None:
        """Whole numbers on the x axis."""
        from matplotlib.ticker import MaxNLocator

        self.axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    def _log_ticks(self) -> None:
        from matplotlib.ticker import (
            FuncFormatter,
            LogLocator,
            MaxNLocator,
            NullLocator,
        )

        self.axis.set_yscale("log")
        low, high = self.axis.get_ylim()
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


@dataclass
class Drawing:
    """A figure.

    Attributes:
        name: of its file, without the ending, and its id in a page.
        title: heading.
        caption: one sentence that says how to read it.
        canvas: matplotlib's figure, without the title.
        panels: its axes, row by row.
    """

    name: str
    title: str
    caption: str
    canvas: Any
    panels: list[Panel]

    @property
    def description(self) -> str:
        """What it shows, in words."""
        titles = [panel.axis.get_title(loc="left") for panel in self.panels]
        said = [
            ": ".join(filter(str.strip, (title, "; ".join(panel.said))))
            for title, panel in zip(titles, self.panels)
        ]
        return " ".join(f"{self.title}. {'. '.join(said)}.".split())

    def titled(self, about: str = "") -> Any:
        """The canvas to be shown by itself: with a heading.

        Args:
            about: what the figure is of, before its title.
        """
        with styled():
            heading = ": ".join(filter(None, (about, self.title)))
            self.canvas.suptitle(_legible(heading, 90))
        return self.canvas

    def _add_legend(self) -> None:
        entries: dict[str, Any] = {}
        for panel in self.panels:
            entries |= {k: v for k, v in panel.legend.items() if k not in entries}
        if not entries:
            return
        # In letters, of which a row has room for some 130.
        widths = [min(len(label), 48) + 7 for label in entries]
        columns = 130 // max(widths)
        if sum(widths) <= 130 or columns > len(entries):
            columns = len(entries)
        self.canvas.legend(
            list(entries.values()),
            [_legible(label) for label in entries],
            loc="outside lower center",
            ncols=columns,
        )


@contextmanager
def drawing(
    name: str,
    title: str,
    caption: str,
    panels: int = 1,
    *,
    columns: Optional[int] = None,
    height: float = _HEIGHT,
    log: bool = False,
    share_y: Union[bool, str] = False,
) -> Iterator[Drawing]:
    """Draw a figure in our style, that needs no display.

    Args:
        name, title, caption: of the :class:`Drawing`.
        panels: how many, at least one.
        columns: of panels; None for what suits their number.
        height: of a row of panels, in inches; the figure is 9 inches wide.
        log: whether y axes are logarithmic.
        share_y: as of ``Figure.subplots``, so that panels can be compared.

    Raises:
        ImportError: matplotlib is missing.
    """
    columns = columns or (2 if panels in (2, 4) else min(3, panels))
    rows = -(-panels // columns)
    with styled():
        # Not from pyplot, whose figures live until they are closed.
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(_WIDTH, height * rows + 0.3), layout="constrained")
        axes = list(canvas.subplots(rows, columns, sharey=share_y, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.set_visible(False)
        made = [Panel(axis, log) for axis in axes[:panels]]
        found = Drawing(name, title, caption, canvas, made)
        yield found
        for panel in made:
            if log:
                panel._log_ticks()
        found._add_legend()


def by_kind(
    name: str,
    title: str,
    caption: str,
    kinds: Sequence[Kind],
    y: str,
    draw: Callable[[Panel, Kind], None],
    **options: Any,
) -> Optional[Drawing]:
    """A figure with a panel for each kind of linear, by layer.

    Args:
        name, title, caption: of the :class:`Drawing`.
        kinds: for the panels.
        y: what the y axis counts, with unit.
        draw: draws a kind into its panel.
        options: as of :func:`drawing`.

    Returns:
        None without kinds.
    """
    if not kinds:
        return None
    with drawing(name, title, caption, len(kinds), **options) as found:
        for panel, kind in zip(found.panels, kinds):
            draw(panel, kind)
            panel.name(kind.title, y, "" if kind.categories else "decoder layer")
            if kind.categories:
                panel.categories(kind.categories)
            else:
                panel.layers()
    return found
