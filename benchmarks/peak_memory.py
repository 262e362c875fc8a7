# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a call adds to a process's memory."""

import ctypes
from pathlib import Path
from typing import Any, Callable

__all__ = ["peak_bytes"]

# mallopt's number for it, in glibc.
_MMAP_THRESHOLD = -3


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call adds to the process's resident memory, at its peak (Linux).

    From its first call on, memory that is freed is given back at once, which costs time.
    """

    def read(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status has no {field}")

    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS:")
    call()
    return read("VmHWM:") - before
