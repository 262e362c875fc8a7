# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What all figures share: matplotlib, colours, and where a linear stands."""

import math
import re
from typing import Any, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "Style",
    "by_place",
    "finite",
    "label_places",
    "legend_below",
    "new_figure",
    "panels_by_place",
    "style_of",
]

# Okabe and Ito's palette, which the colour-blind tell apart; each colour comes with a
# marker and a hatch of its own.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")
_FIRST = ("text", "vision", "audio")


class Style:
    """How a modality looks in every figure.

    Args:
        place: in the list of modalities.
    """

    def __init__(self, place: int):
        self.color = _COLORS[place % len(_COLORS)]
        self.marker = _MARKERS[place % len(_MARKERS)]
        self.hatch = _HATCHES[place % len(_HATCHES)]

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {"color": self.color, "marker": self.marker, "markersize": 4}


def style_of(modality: str, modalities: Sequence[str]) -> Style:
    """The style of a modality: the same for text, vision and audio in every model."""
    known = [*_FIRST, *(m for m in modalities if m not in _FIRST)]
    return Style(known.index(modality))


def new_figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """An empty figure that needs no display.

    Args:
        rows, columns: of axes.
        height: of one row, in inches; the figure is 9 inches wide.

    Returns:
        The figure, and its axes row by row.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'torchao_masquant[report]'."
        ) from error
    # Not from pyplot, whose figures live until they are closed.
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    figure.set_facecolor("white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(True, alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def by_place(names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Sort linears by what they are and by their layer.

    Args:
        names: in the model's order.

    Returns:
        What is left of a name behind its layer's number ("self_attn.q_proj") to
        (layer, name) pairs. Names without a number stand under "", in order.
    """
    places: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
        if match is None:
            unnumbered = places.setdefault("", [])
            unnumbered.append((len(unnumbered), name))
        else:
            places.setdefault(match[2], []).append((int(match[1]), name))
    return places


def finite(values: Iterable[float]) -> list[float]:
    """Values to draw: a gap for those that are infinite."""
    return [value if math.isfinite(value) else math.nan for value in values]


def label_places(axis: Any, kind: str, places: Sequence[tuple[int, str]]) -> None:
    """Name the horizontal axis of one kind of linears."""
    from matplotlib.ticker import MaxNLocator

    if kind:
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("decoder layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.set_xticks(
            [place for place, _ in places],
            [name for _, name in places],
            rotation=30,
            ha="right",
            fontsize=7,
        )


def panels_by_place(
    names: Iterable[str], columns: int, height: float
) -> tuple[Any, Iterator[tuple[Any, list[tuple[int, str]]]]]:
    """A figure with a panel for each kind of linear.

    Args:
        names: of linears, in the model's order.
        columns: of panels, at most.
        height: of a panel, as of :func:`new_figure`.

    Returns:
        The figure, and each panel's axes with the (layer, name) pairs of its kind. A panel
        is labelled once it is drawn on, when the next one is asked for.
    """
    kinds = by_place(names)
    columns = min(columns, len(kinds))
    figure, axes = new_figure(math.ceil(len(kinds) / columns), columns, height)

    def panels() -> Iterator[tuple[Any, list[tuple[int, str]]]]:
        for axis, (kind, places) in zip(axes, kinds.items()):
            yield axis, places
            label_places(axis, kind, places)
        for axis in axes[len(kinds) :]:
            axis.set_visible(False)

    return figure, panels()


def legend_below(figure: Any, entries: Mapping[str, Any]) -> None:
    """One legend for all axes of a figure."""
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=len(entries) if len(entries) <= 5 else (len(entries) + 1) // 2,
        frameon=False,
        fontsize=8,
    )
