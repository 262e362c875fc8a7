# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What stands at axes: text that can be drawn, names of places, and ticks."""

import math
import re
import textwrap
from typing import Any, Sequence

__all__ = ["categories", "columns_of", "layers", "legible", "log_ticks", "plain"]

# Of the names under all axes of a row: more letters than these slant, longer names are
# cut, and of more names not each is told.
_UPRIGHT, _LONGEST, _MOST = 90, 24, 24

# Characters that no XML file may hold.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def plain(text: str) -> str:
    """Whatever a file says, without characters that no figure can hold."""
    return _NO_TEXT.sub("\ufffd", text)


def legible(text: str, width: int = 48) -> str:
    """Text that can be drawn, in lines of some letters."""
    return textwrap.fill(plain(text), width) or " "


def columns_of(axis: Any) -> int:
    """How many axes there are in a row."""
    return axis.get_subplotspec().get_gridspec().ncols


def categories(axis: Any, names: Sequence[str]) -> None:
    """Names at the places 0, 1, ... of the x axis."""
    labels = [
        name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in names
    ]
    step = -(-len(labels) // max(1, _MOST // columns_of(axis)))
    axis.set_xticks(
        range(0, len(labels), step), [legible(label) for label in labels[::step]]
    )
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.grid(False, axis="x")
    if sum(map(len, labels[::step])) > _UPRIGHT // columns_of(axis):
        axis.tick_params(axis="x", labelrotation=30)
        for text in axis.get_xticklabels():
            text.set_ha("right")


def layers(axis: Any) -> None:
    """Whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def log_ticks(axis: Any) -> None:
    """A logarithmic y axis whose ticks are numbers."""
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullLocator,
    )

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if not 0 < low < high:
        # There is no value at all.
        axis.set_ylim(low := 1.0, high := 10.0)
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 3 else (1.0,)
    locator: Any = LogLocator(subs=subs, numticks=7)
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
        # On a short axis, values are all but evenly spaced.
        locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
