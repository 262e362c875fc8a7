# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How many threads a matrix is worth, where other processes want the cores too.

OpenMP's threads wait for each other by spinning. Where a neighbour has the core of one of
them, all others wait until the system gives it back, tens of milliseconds, at every loop
that they share; a decomposition of a small matrix has thousands of them. Two threads on two
busy cores take 50 to 1000 times as long for a matrix of 64 channels as one does, 6 times for
one of 1024, and no longer than that for products of larger ones.
"""

import contextlib
import ctypes
import functools
import math
import os
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional

import torch

__all__ = ["SMALL", "available_cores", "threads_for", "widest"]

#: Channels of a matrix that one thread has to itself.
SMALL = 1024

_CGROUP = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def threads_for(size: int) -> Iterator[None]:
    """Work on matrices on as many threads as they are worth, of this thread's own.

    One where they are small; no more than the process may use of the cores where not.
    Other threads of the process keep the number that they have, and this one gets its own
    back, whatever happens inside. A number that was set before is never raised.

    Args:
        size: largest dimension of the matrices.
    """
    before = torch.get_num_threads()
    wanted = 1 if size <= SMALL else min(before, available_cores(_CGROUP))
    if wanted == before:
        yield
        return
    set_openmp, set_mkl = _setters()
    if set_openmp is None:
        # Sets, beside this thread's, what threads that are begun meanwhile start with.
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)
        return
    set_openmp(wanted)
    of_mkl = set_mkl(wanted) if set_mkl is not None else 0
    try:
        yield
    finally:
        set_openmp(before)
        if set_mkl is not None:
            set_mkl(of_mkl)


def widest(weights: Iterable[torch.Tensor]) -> int:
    """Largest dimension of weights (N, K), or (E, N, K) of experts; 0 without any."""
    return max((max(weight.shape[-2:]) for weight in weights), default=0)


@functools.cache
def available_cores(cgroup: Path) -> int:
    """What a container's quota leaves this process of the machine; all without one.

    Args:
        cgroup: folder that the control group is told in, of version 2 or 1.
    """
    with contextlib.suppress(OSError, ValueError):
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            of_cpu = cgroup / "cpu"
            quota = (of_cpu / "cpu.cfs_quota_us").read_text()
            period = (of_cpu / "cpu.cfs_period_us").read_text()
        if quota != "max" and int(quota) > 0:
            return max(1, math.ceil(int(quota) / int(period)))
    return os.cpu_count() or 1


_Setter = Optional[Callable[[int], int]]


@functools.cache
def _setters() -> tuple[_Setter, _Setter]:
    """OpenMP's and MKL's own, for the calling thread alone; None where not exported.

    ``torch.set_num_threads`` also sets what later threads of the process start with.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        openmp = library.omp_set_num_threads
    except (OSError, AttributeError):
        return None, None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
    if mkl is not None:
        mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl
