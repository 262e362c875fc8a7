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

import itertools
import statistics
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch

from torchao_masquant.calibration.statistics import InputStatistics, Moments
from torchao_masquant.options import Scheme, SolverOptions, get_scheme, resolve_rank
from torchao_masquant.planning.least_squares import non_negative_fit
from torchao_masquant.planning.machine import Machine, Rates
from torchao_masquant.planning.measuring_rest import rest_rates
from torchao_masquant.planning.processor_time import processor_seconds
from torchao_masquant.planning.weight_bytes import Compensation, weight_bytes
from torchao_masquant.solver.cost import Work, solver_work
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "COMPENSATION",
    "CHOSEN",
    "FIXED",
    "SOLVED",
    "linear_call",
    "make_weight",
    "measure_machine",
    "median_of_three",
    "mixed_ids",
    "random_statistics",
    "solve_once",
]

#: of all that is measured
COMPENSATION = Compensation(modalities=3)
_NAMES = ("text", "vision", "audio")
_SHAPES = ((384, 384), (1024, 512), (512, 1024), (1024, 1024), (4096, 1024))
_TOKENS = (1, 32, 256)

# More than a processor caches.
_CACHE_BYTES = 128 << 20

#: N of each linear, K, modalities, and whether exponent and separation are chosen
SOLVED: tuple[tuple[tuple[int, ...], int, int, bool], ...] = (
    ((64,), 128, 2, True),
    ((192,), 192, 3, True),
    ((256, 64, 64), 256, 3, True),
    ((640,), 256, 3, True),
    ((704, 704), 256, 2, True),
    ((256,), 384, 2, True),
    ((1280,), 384, 2, True),
    ((512,), 512, 3, True),
    ((1536,), 512, 3, False),
    ((320,), 640, 3, True),
    ((128,), 768, 2, True),
    ((768,), 1024, 2, True),
    ((1024,), 1024, 3, False),
    ((128,), 2048, 2, False),
    ((64,), 3072, 2, False),
)
FIXED = SolverOptions(alpha=0.5, separation=1.0)
CHOSEN = SolverOptions(alpha="auto", separation="auto")


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


def random_statistics(
    k: int, modalities: int = 3, tokens: Optional[int] = None
) -> InputStatistics:
    """Of inputs with outliers that differ between the modalities.

    Args:
        k: width.
        modalities: two or three.
        tokens: of each; None for enough that no direction is unused.
    """
    g = torch.Generator().manual_seed(k)
    names = _NAMES[:modalities]
    found = InputStatistics(k, names, torch.device("cpu"), True)
    for index in range(modalities):
        x = torch.randn(tokens or max(512, 2 * k), k, generator=g)
        x[:, index :: max(1, k // 4)] *= 20.0
        found.update("x", x, torch.full((x.shape[0],), index))
    return found


def solve_once(
    outputs: Sequence[int], k: int, modalities: int, chosen: bool
) -> tuple[Callable[[], Any], Work]:
    """A call that solves for linears that share random statistics, and its operations.

    Args:
        outputs: N of each linear.
        k: width of the input.
        modalities: two or three.
        chosen: whether exponent and separation are, or fixed.
    """
    g = torch.Generator().manual_seed(sum(outputs))
    weights = {
        f"linear {i}": torch.randn(n, k, generator=g).bfloat16()
        for i, n in enumerate(outputs)
    }
    options = CHOSEN if chosen else FIXED
    work = solver_work([(n, k) for n in outputs], modalities, options)
    found = random_statistics(k, modalities)
    return partial(solve_group, weights, found, options), work


def median_of_three(call: Callable[[], Any]) -> float:
    """Processor seconds of a long call."""
    found = []
    for _ in range(3):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return statistics.median(found)


def linear_call(scheme: Optional[Scheme], n: int, k: int, tokens: int) -> Callable:
    """Each call of it is one of a linear (N, K) whose weight no cache holds.

    As in a model, whose other weights were read since.

    Args:
        scheme: None for a dense one.
        n: output channels.
        k: input channels.
        tokens: of a call; half of them of other modalities, unless it is one.
    """
    x, ids = torch.randn(tokens, k).bfloat16(), mixed_ids(tokens)
    weight: torch.Tensor
    if scheme is None:
        weight = torch.randn(n, k).bfloat16()
        size = weight.nbytes
    else:
        weight = make_weight(scheme, n, k)
        size = weight.nbytes_stored
    copies = itertools.cycle(weight.clone() for _ in range(-(-_CACHE_BYTES // size)))

    def call() -> torch.Tensor:
        if scheme is None:
            return torch.nn.functional.linear(x, next(copies))
        return torch.ops.masquant.linear(x, next(copies), ids)

    for _ in range(-(-_CACHE_BYTES // size)):
        next(copies)
    return call


def _linear_rates(kind: str) -> Rates:
    features, seconds = [], []
    scheme = None if kind == "dense" else get_scheme(kind)
    for n, k in _SHAPES:
        size = n * k * 2
        rank = 0
        if scheme is not None:
            rank = resolve_rank(COMPENSATION.rank, n, k)
            size = weight_bytes(n, k, scheme, COMPENSATION)
        for tokens in _TOKENS:
            macs = tokens * n * k + tokens // 2 * rank * (n + k)
            features.append((macs, size, tokens * (n + k), 1))
            call = linear_call(scheme, n, k, tokens)
            seconds.append(processor_seconds(call, 0.3))
    return Rates(*non_negative_fit(features, seconds))


def _solver_rates() -> Work:
    features, seconds = [], []
    for outputs, k, modalities, chosen in SOLVED:
        call, work = solve_once(outputs, k, modalities, chosen)
        features.append(astuple(work))
        seconds.append(median_of_three(call))
    # What dominates large linears by itself, so that it is told apart from the rest.
    for n, k in ((256, 512), (512, 1024), (1024, 1024), (128, 2048)):
        x = torch.randn(n, k, dtype=torch.float64)
        square = torch.randn(k, k, dtype=torch.float64)
        features.append(astuple(Work(macs=n * k * k)))
        seconds.append(processor_seconds(partial(torch.matmul, x, square), 0.2))
    for size in (128, 256, 512, 1024):
        x = torch.randn(2 * size, size, dtype=torch.float64)
        square = x.t() @ x
        features.append(astuple(Work(cubes=size**3, squares=size**2)))
        seconds.append(processor_seconds(partial(torch.linalg.eigh, square), 0.2))
    return Work(*non_negative_fit(features, seconds))


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
        # First: an allocator that has had large blocks gives pages back less often, and a
        # calibration is a process of its own.
        solver = _solver_rates()
        kinds = ("dense", "w8a8", "w4a8", "w4a16")
        linear = {kind: _linear_rates(kind) for kind in kinds}
        rest = rest_rates()
        per_mac = _statistics_per_mac()
    return Machine(
        name,
        f"measured on one core of {_processor()}, torch {torch.__version__}",
        linear,
        rest,
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
