# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A figure: its panels, one legend, and what is said beside it."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Literal, Optional, Sequence

from torchao_masquant.figures.panel import Panel
from torchao_masquant.figures.places import Kind
from torchao_masquant.figures.style import styled
from torchao_masquant.figures.ticks import categories, layers, legible, log_ticks

__all__ = ["Drawing", "by_kind", "drawing"]

# In inches.
_WIDTH, _HEIGHT = 9.0, 2.4


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
            self.canvas.suptitle(legible(heading, 90))
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
            [legible(label) for label in entries],
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
    share_y: Literal["none", "all", "row"] = "none",
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
                log_ticks(panel.axis)
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
                categories(panel.axis, kind.categories)
            else:
                layers(panel.axis)
    return found
