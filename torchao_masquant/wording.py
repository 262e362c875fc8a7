# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Numbers and names as people read them."""

import math
from typing import Optional, Sequence

from torchao_masquant.options import METHODS

__all__ = [
    "MISSING",
    "amount",
    "byte_size",
    "joined",
    "method_name",
    "percent",
    "points",
]

#: a cell without a value
MISSING = "–"


def method_name(method: str) -> str:
    """A method's name in a sentence; of the model without any, and of others, too."""
    if not method:
        return "dense"
    return METHODS[method].title if method in METHODS else method


def amount(value: Optional[float], pattern: str = ".3g") -> str:
    """A number, or a dash for none."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, pattern).replace("-", "−")


def percent(share: Optional[float], pattern: str = ".1f") -> str:
    """0.975 as "97.5 %"."""
    text = amount(None if share is None else 100 * share, pattern)
    return text if text == MISSING else f"{text} %"


def points(share: Optional[float]) -> str:
    """A difference of shares in points of a hundred: 0.01 as "+1.0 points"."""
    if share is None or math.isnan(share):
        return MISSING
    text = amount(100 * share, "+.1f")
    return "unchanged" if text[1:] == "0.0" else f"{text} points"


def byte_size(count: Optional[float]) -> str:
    """Bytes in the largest unit of which there is at least one."""
    if count is None:
        return MISSING
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    place = 0
    while count >= 1024 and place < len(units) - 1:
        count, place = count / 1024, place + 1
    return f"{count:.0f} {units[0]}" if place == 0 else f"{count:.2f} {units[place]}"


def joined(names: Sequence[str]) -> str:
    """A list in a sentence."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
