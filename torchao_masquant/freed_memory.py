# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory that was freed, and that the C library has kept."""

import ctypes
import functools
import sys
from typing import Callable, Optional

__all__ = ["return_freed_memory"]


def return_freed_memory() -> None:
    """Give freed memory back to the system, where it is glibc's to give.

    glibc keeps freed blocks of up to 32 MiB. What a weight's quantization needs for a
    moment is of that size, and its result comes to lie between: without this, a model
    that is quantized weight by weight ends up with as much memory as in full precision,
    and a calibration's memory creeps up block by block.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Optional[Callable[[int], int]]:
    if sys.platform != "linux":
        return None
    # Other C libraries than glibc do not have it.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
