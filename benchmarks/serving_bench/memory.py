# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a process holds, and how fast that grows."""

import ctypes
import os
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Sequence

import numpy as np


class _MallInfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``, summed over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@dataclass(frozen=True)
class Held:
    """What the process holds at a moment (Linux, glibc).

    Attributes:
        resident: bytes of the resident set: what is in use, and what malloc keeps of
            what no longer is.
        allocated: bytes that were asked of malloc and not freed yet.
        blocks: of Python's own allocator, in use: a measure of live objects.
    """

    resident: int
    allocated: int
    blocks: int


def held() -> Held:
    """What this process holds now."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallInfo2
    info = libc.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE"),
        info.uordblks + info.hblkhd,
        sys.getallocatedblocks(),
    )


@dataclass(frozen=True)
class Growth:
    """Slope of a line through what was held, and its standard error, for 1,000 calls.

    The error takes what is beside the line for noise from call to call; memory that
    comes in steps follows no such law, so it is a guide, not a bound.
    """

    per_1000: float
    error: float


def growth(marks: Sequence[tuple[int, Held]]) -> tuple[Growth, Growth, Growth]:
    """How what is held grew over the second half of a load.

    Args:
        marks: (calls done, what was held then), eight at least.

    Returns:
        That of resident bytes, allocated bytes and blocks; NaN for fewer marks.
    """
    late = marks[len(marks) // 2 :]
    if len(late) < 4:
        return (Growth(float("nan"), float("nan")),) * 3
    calls = np.array([done for done, _ in late], dtype=np.float64) / 1000
    found = []
    for values in zip(*(astuple(then) for _, then in late)):
        # Of a line's two parameters, slope first.
        line, covariance = np.polyfit(calls, np.array(values, np.float64), 1, cov=True)
        found.append(Growth(float(line[0]), float(np.sqrt(covariance[0, 0]))))
    return found[0], found[1], found[2]
