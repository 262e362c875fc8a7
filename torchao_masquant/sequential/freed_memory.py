# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Giving freed memory back to the system."""

import ctypes
import functools
from typing import Any, Optional

__all__ = ["return_freed_memory"]


def return_freed_memory() -> None:
    """Let the C library return what it keeps of freed memory, where it can.

    glibc serves allocations of up to 32 MiB from its heap once such were freed, and keeps
    the holes between those that live: without this, a calibration's resident memory
    creeps up by a few MiB a block.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Optional[Any]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        # Another C library than glibc.
        return None
