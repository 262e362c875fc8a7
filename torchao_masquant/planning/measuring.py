# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measures a machine: what a planner's constants are made of.

Of one thread, in processor time: other processes take turns with it, and are not
counted. Each constant is a coefficient of a sum of terms, found by least squares of
relative errors over shapes; none is negative.
"""

import ctypes
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch

from torchao_masquant.calibration.statistics import InputStatistics, Moments
from torchao_masquant.planning.machine import Machine, Rates, SolverRates
from torchao_masquant.planning.weight_bytes import Compensation, weight_bytes
from torchao_masquant.schemes import Scheme, get_scheme
from torchao_masquant.solver.compensation import resolve_rank
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "COMPENSATION",
    "make_weight",
    "measure_machine",
    "mixed_ids",
    "peak_bytes",
    "processor_seconds",
    "random_statistics",
    "solve_once",
]

#: of all that is measured
COMPENSATION = Compensation(modalities=3)
_NAMES = ("text", "vision", "audio")
_SHAPES = ((384, 384), (1024, 512), (512, 1024), (1024, 1024), (2048, 1024))
_TOKENS = (1, 32, 256)
_SOLVED = ((192, 192), (256, 640), (384, 256), (512, 512), (640, 320), (768, 128))

# mallopt's number for it, in glibc.
_MMAP_THRESHOLD = -3


def processor_seconds(call: Callable[[], Any], least: float = 0.02) -> float:
    """Median processor time of a call, over at least five, after two to warm up."""
    call(), call()
    found: list[float] = []
    while len(found) < 5 or (sum(found) < least and len(found) < 200):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return statistics.median(found)


def make_weight(scheme: Scheme, n: int, k: int) -> MASQuantTensor:
    """A random quantized weight with all that goes with it."""
    g = torch.Generator().manual_seed(0)
    rank = resolve_rank(COMPENSATION.rank, n, k)
    others = COMPENSATION.modalities - 1
    return MASQuantTensor.from_hp(
        torch.randn(n, k, generator=g).bfloat16(),
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        modalities=_NAMES,
        smoothing_factor=torch.rand(3, k, generator=g) + 0.5,
        ranks=(rank,) * others,
        l1=torch.randn(k, rank * others, generator=g),
        l2=torch.randn(rank * others, n, generator=g),
        modality_bias=torch.randn(3, n, generator=g),
        act_shift=None if scheme.weight_only else torch.randn(3, k, generator=g),
    )


def mixed_ids(tokens: int) -> Optional[torch.Tensor]:
    """Half of the tokens in spans of other modalities; one token is a decode step."""
    if tokens == 1:
        return None
    ids = torch.zeros(tokens, dtype=torch.int64)
    ids[: tokens // 4], ids[tokens // 4 : tokens // 2] = 1, 2
    return ids


def random_statistics(k: int, tokens: int = 512) -> InputStatistics:
    """Of inputs with outliers that differ between the modalities."""
    g = torch.Generator().manual_seed(k)
    found = InputStatistics(k, _NAMES, torch.device("cpu"), True)
    for index in range(len(_NAMES)):
        x = torch.randn(max(tokens, 2 * k), k, generator=g)
        x[:, index :: max(1, k // 4)] *= 20.0
        found.update("x", x, torch.full((x.shape[0],), index))
    return found


def solve_once(k: int, n: int, scheme: str = "w4a8") -> Callable[[], Any]:
    """A call that solves for one linear, on random statistics."""
    g = torch.Generator().manual_seed(n)
    weights = {"linear": torch.randn(n, k, generator=g).bfloat16()}
    found, options = random_statistics(k), SolverOptions(scheme=scheme)
    return lambda: solve_group(weights, found, options)


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


def _fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none negative, of least relative error."""
    matrix = np.asarray(features, dtype=np.float64) / np.asarray(values)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(values)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(found * np.linalg.norm(matrix[:, used], axis=0))))
    coefficients = np.zeros(matrix.shape[1])
    coefficients[used] = np.maximum(found, 0)
    return [float(c) for c in coefficients]


def _linear_rates(kind: str) -> Rates:
    features, seconds = [], []
    call: Callable[[], Any]
    for n, k in _SHAPES:
        size = n * k * 2
        if kind == "dense":
            dense = torch.randn(n, k).bfloat16()
        else:
            scheme = get_scheme(kind)
            weight = make_weight(scheme, n, k)
            size = weight_bytes(n, k, scheme, COMPENSATION)
        for tokens in _TOKENS:
            x, ids = torch.randn(tokens, k).bfloat16(), mixed_ids(tokens)
            macs = tokens * n * k
            if kind == "dense":
                call = partial(torch.nn.functional.linear, x, dense)
            else:
                rank = resolve_rank(COMPENSATION.rank, n, k)
                macs += (0 if ids is None else tokens // 2) * rank * (n + k)
                call = partial(torch.ops.masquant.linear, x, weight, ids)
            features.append((macs, size, tokens * (n + k), 1))
            seconds.append(processor_seconds(call))
    return Rates(*_fit(features, seconds))


def _solver_rates() -> SolverRates:
    calls = [solve_once(k, n) for k, n in _SOLVED]
    times = []
    calls[0]()
    for call in calls:
        started = time.process_time()
        call()
        times.append((time.process_time() - started) / COMPENSATION.modalities)
    # Last of all, see there.
    sizes = [peak_bytes(call) for call in calls]
    return SolverRates(
        tuple(_fit([(k**3, k**2 * n, k * n, 1) for k, n in _SOLVED], times)),
        tuple(_fit([(k * k, k * n) for k, n in _SOLVED], sizes)),
    )


def _statistics_per_mac(k: int = 512, tokens: int = 256) -> float:
    moments = Moments.zeros(k, torch.device("cpu"), True)
    x = torch.randn(tokens, k)
    return processor_seconds(lambda: moments.update(x), 0.1) / (tokens * k * k)


def measure_machine(
    name: str, disk_bytes_per_second: float, link_bytes_per_second: float
) -> Machine:
    """The machine that this runs on: one of its cores.

    Args:
        disk_bytes_per_second: not measured here, where files are cached.
        link_bytes_per_second: between two machines, not measured either.
    """
    torch.set_num_threads(1)
    with torch.no_grad():
        kinds = ("dense", "w8a8", "w4a8", "w4a16")
        linear = {kind: _linear_rates(kind) for kind in kinds}
        per_mac = _statistics_per_mac()
        solver = _solver_rates()
    return Machine(
        name,
        f"measured on one core of {_processor()}, torch {torch.__version__}",
        linear,
        per_mac,
        solver,
        link_bytes_per_second,
        disk_bytes_per_second,
        ("the speed of disks and links is assumed",),
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"
