# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a calibration will take, before it takes it."""

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence

import torch

from torchao_masquant.learning.memory import learning_bytes
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.cost import solved_shapes, solver_bytes, solver_cost
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import (
    InputStatistics,
    statistics_bytes,
)

__all__ = ["Estimate", "available_memory", "check_time", "estimate", "solving_rate"]

_LOGGER = logging.getLogger(__name__)

_MIB, _GIB = 1 << 20, 1 << 30

#: Python, torch and transformers take so much once they are imported.
_PROGRAM_BYTES = 400 * _MIB

#: Width of the linear that the time of solving is measured on.
_PROBE_WIDTH = 512

#: name to (N, K) of a linear, (E, N, K) of experts
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """Upper estimates, in bytes; those of memory of one process.

    Attributes:
        longest: tokens of the longest sample.
        front: weights in front of the decoder.
        block: weights of the largest block, with their quantized copy.
        statistics: of the linears that are observed at a time.
        least: of these, what one linear needs alone.
        solver: matrices of the solver, for the linear that needs most together with the
            statistics of its pass; what they take beyond ``statistics``.
        widest: name of that linear.
        forward: activations inside a block, of the longest sample.
        activations: of all samples, between blocks; zero where they are on disk.
        disk: of what is written, temporary files with it.
        conversion: more than the weights of a block, while they are loaded: tensors of
            experts are made from those of each expert.
        of_experts: whether the widest is of experts.
        learning: of a block, with gradients, where it is learned.
    """

    longest: int
    front: int
    block: int
    statistics: int
    least: int
    solver: int
    widest: str
    forward: int
    activations: int
    disk: int
    conversion: int = 0
    of_experts: bool = False
    learning: int = 0

    @property
    def device(self) -> int:
        """Peak of the memory where blocks run, less what the program itself takes."""
        solving = self.statistics + max(self.solver, self.forward)
        needed = max(solving, self.conversion, self.learning)
        return max(self.front, self.block + needed)

    @property
    def peak(self) -> int:
        """Peak of the memory of a process whose blocks run on the CPU."""
        return _PROGRAM_BYTES + self.device + self.activations

    def check(
        self,
        memory: Optional[int],
        on_device: Optional[int],
        folder: Path,
        written: int = 0,
    ) -> None:
        """Raise where it will not fit.

        Args:
            memory: bytes that this process may take; None where that is not known.
            on_device: bytes that are free on the device, None where blocks run on the
                CPU.
            folder: that is written to.
            written: bytes that an interrupted run has written already.

        Raises:
            ValueError: names the option that would make it fit.
        """
        needed = self.peak if on_device is None else _PROGRAM_BYTES + self.activations
        for name, need, has in (
            ("memory", needed, memory),
            ("device memory", self.device, on_device),
        ):
            if has is not None and need > has:
                raise ValueError(
                    f"the calibration needs about {need / _GIB:.2f} GiB of {name}, and "
                    f"there are {has / _GIB:.2f} GiB: {self._advice(need - has)}."
                )
        free = shutil.disk_usage(folder).free
        left = self.disk - written
        if left > free:
            raise ValueError(
                f"the calibration writes about {left / _GIB:.2f} GiB, and "
                f"{str(folder)!r} has {free / _GIB:.2f} GiB left: give an output on "
                "another disk."
            )

    def _advice(self, missing: int) -> str:
        if self.activations >= missing:
            return (
                f"keep the {self.activations / _GIB:.2f} GiB of activations in files, "
                "with activations='disk'"
            )
        if self.front >= self.block + self.statistics + self.solver:
            return "the embeddings and towers alone take it; run on a larger machine"
        if self.learning > max(self.statistics + self.solver, self.forward):
            return (
                f"learning takes {self.learning / _GIB:.2f} GiB of it, for a block and the "
                f"longest sample, of {self.longest} tokens: shorten that, leave linears "
                "out with exclude=, or do without, with epochs=0"
            )
        if self.statistics - missing >= self.least:
            return (
                "observe fewer linears at a time, with max_statistics_bytes="
                f"{self.statistics - missing}"
            )
        if self.forward > self.solver:
            return f"shorten the longest sample, of {self.longest} tokens"
        pattern = _pattern(self.widest, self.of_experts)
        if self.of_experts:
            return (
                f"most of it is for what is found for each expert of {self.widest}: "
                f"leave experts in high precision, with exclude='{pattern}', or choose "
                "method='smoothquant', which finds one factor for all"
            )
        return (
            f"most of it is for covariances of {self.widest}: leave such linears out, "
            f"with exclude='{pattern}', or choose method='smoothquant', which needs none"
        )


def _pattern(name: str, of_experts: bool) -> str:
    """Of all linears that are called so; of experts, which go as a whole."""
    module, _, last = name.rpartition(".")
    return f"*.{module.rpartition('.')[2]}.*" if of_experts else f"*.{last}"


def estimate(
    *,
    blocks: Sequence[Shapes],
    block_bytes: Sequence[int],
    conversion_bytes: int = 0,
    front_bytes: int,
    other_bytes: int,
    hidden: int,
    itemsize: int,
    tokens: Sequence[int],
    modalities: int,
    options: SolverOptions,
    max_statistics_bytes: int,
    on_disk: bool,
    writes: tuple[bool, bool],
) -> Estimate:
    """Estimate memory and disk from sizes alone.

    Args:
        blocks: of each block, what is to be quantized.
        block_bytes: of each block's weights.
        conversion_bytes: more, while a block is loaded.
        front_bytes: of the weights in front of the decoder.
        other_bytes: of all weights outside of the blocks.
        hidden: width of the hidden states.
        itemsize: of their type.
        tokens: of each sample of this process.
        modalities: M.
        options: of the solution.
        max_statistics_bytes: bound of the statistics.
        on_disk: whether activations are.
        writes: whether a checkpoint, and a recipe.
    """
    per_modality = options.procedure.per_modality
    asymmetric = options.asymmetric_calibration
    if asymmetric:
        # Each input has a pass of its own.
        max_statistics_bytes = 0
    statistics, least, solving, widest, of_experts = 0, 0, 0, "", False
    for linears in blocks:
        needs = {
            name: statistics_bytes(
                k, modalities, per_modality, sum(experts), drifts=asymmetric
            )
            for name, (*experts, _, k) in linears.items()
        }
        # Linears that share their input need it once: all of them are more than enough.
        # An input that alone is more than the bound has a pass of its own.
        shared = sum(need for need in needs.values() if need <= max_statistics_bytes)
        together = min(shared, max_statistics_bytes)
        for name, shape in linears.items():
            *experts, n, k = shape
            beside = math.prod(shape)
            if not experts:
                # Those of one width may share their input.
                beside = sum(math.prod(s) for s in linears.values() if s[-1] == k)
            work = solver_bytes(n, k, beside, modalities, options)
            if per_modality:
                # The count is right to within a tenth.
                work += work // 10
                # Each expert keeps, as measured: integers and pairs of the best try and of
                # the last, and what it takes on the way.
                work += sum(experts) * n * k * 2 * (6 + modalities)
                if experts and options.procedure.shift:
                    # Second moments without the experts' means, and what makes them.
                    work += 8 * (modalities + 3) * k * k
            if asymmetric:
                # The weights that are solved for, what is quantized of the block, and
                # what the regression has of a pair of streams.
                work += 12 * beside + 2 * sum(map(math.prod, linears.values()))
                work += 8 * 7 * k * k
            in_pass = max(needs[name], together)
            statistics, least = max(statistics, in_pass), max(least, needs[name])
            if in_pass + work > solving:
                solving, widest, of_experts = in_pass + work, name, bool(experts)
    every = [
        shape
        for linears in blocks
        for weight in linears.values()
        for shape in solved_shapes(weight)
    ]
    integers = sum(n * k for n, k in every)
    pairs = modalities * sum(n + k for n, k in every) * 4
    longest = max(tokens)
    inner = max((n for n, _ in every), default=hidden)
    # The store holds what the decoder was called with and what a block gave; where it is
    # learned, or met behind quantized ones, also what it is called with there and what it
    # gave.
    kept = 4 if options.epochs or asymmetric else 2
    states = kept * sum(tokens) * hidden * itemsize
    disk = states if on_disk else 0
    if writes[0]:
        disk += sum(block_bytes) + other_bytes + 4 * pairs
    if writes[1]:
        # At the end the parts of the recipe are there beside the joined one.
        disk += 2 * (integers + 8 * pairs)
    elif options.epochs or asymmetric:
        # A run that goes on makes the quantized stream from the parts.
        disk += integers + 8 * pairs
    largest = max(
        (
            size + sum(math.prod(shape) for shape in linears.values())
            for size, linears in zip(block_bytes, blocks)
        ),
        default=0,
    )
    forward = longest * (4 * inner + 12 * hidden) * max(itemsize, 4)
    if asymmetric:
        # An input in the full-precision stream, and how it differs, in float64.
        forward += longest * max(k for _, k in every) * (2 * max(itemsize, 4) + 8)
    learning = 0
    if options.epochs:
        # Gradients need what the forward pass makes beside the linears, too.
        learning = forward + max(
            learning_bytes(
                [(n, k) for w in linears.values() for n, k in solved_shapes(w)],
                longest,
                modalities,
                options,
            )
            for linears in blocks
        )
    return Estimate(
        longest=longest,
        front=front_bytes,
        block=largest,
        statistics=statistics,
        least=least,
        solver=max(solving - statistics, 0),
        widest=widest,
        forward=forward,
        activations=0 if on_disk else states,
        disk=disk,
        conversion=conversion_bytes,
        of_experts=of_experts,
        learning=learning,
    )


def available_memory() -> Optional[int]:
    """Bytes that this process may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [1024 * int(n.split()[1]) for n in lines if n.startswith("MemAvailable")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):
            pass
    return min(found, default=None)


def solving_rate(
    modalities: int, options: SolverOptions, device: torch.device
) -> float:
    """Multiplications a second of the solver, measured on a small linear."""
    generator = torch.Generator().manual_seed(0)
    width = _PROBE_WIDTH
    names = tuple(f"modality {index}" for index in range(modalities))
    statistics = InputStatistics(
        width, names, device, second_moments=options.procedure.per_modality
    )
    for index in range(modalities):
        x = torch.randn(2 * width, width, generator=generator).to(device)
        ids = torch.full((len(x),), index, device=device)
        statistics.update("probe", x, ids)
    weight = torch.randn(width, width, generator=generator).to(device)
    probe = SolverOptions(
        **{
            **vars(options),
            "alpha": 0.5,
            "separation": 1.0,
            "rank": 0.05,
            "modality_weights": None,
            "group_size": None,
            "hadamard_size": None,
            "budget": None,
        }
    )
    start = time.perf_counter()
    solve_group({"probe": weight}, statistics, probe)
    seconds = time.perf_counter() - start
    return solver_cost([(width, width)], modalities, probe) / seconds


def check_time(
    blocks: Sequence[Shapes],
    modalities: int,
    options: SolverOptions,
    *,
    forward: float,
    device: torch.device,
    processes: int,
    limit: Optional[float],
) -> Optional[float]:
    """Seconds that the blocks will take, to within a factor of two or three.

    Measured on a small linear, and scaled by the operations of the larger ones; not
    measured where that alone would take a good part of the time.

    Args:
        blocks: of each block that is left, what is to be quantized.
        modalities: M.
        options: of the solution.
        forward: seconds that a process's samples take to run through one block.
        device: that solves.
        processes: that share the work.
        limit: seconds that it may take; None for any.

    Returns:
        The seconds, None where they were not measured.

    Raises:
        ValueError: it will take longer.
    """
    costs = [
        sum(
            solver_cost(solved_shapes(shape), modalities, options)
            for shape in linears.values()
        )
        for linears in blocks
    ]
    probe = solver_cost([(_PROBE_WIDTH, _PROBE_WIDTH)], modalities, options)
    if limit is None and sum(costs) < 20 * probe:
        return None
    rate = solving_rate(modalities, options, device)
    # Once through the block, and once with what was found. An epoch is as long as 7 passes
    # on a block of 512 channels, and as 19 on one of 64, where all samples judge, too.
    # Where a batch has fewer samples than there are processes, others wait.
    waits = max(1.0, processes / options.batch_size)
    often = 2.0
    if options.asymmetric_calibration:
        # Up to each of some four inputs in both streams, and once in each to the end.
        often += 6
    passes = forward * (often + 8 * options.epochs * waits) * len(blocks)
    seconds = passes + sum(costs) / rate / processes
    _LOGGER.info(
        "%d blocks, about %.1f minutes (%.1f of them to run the samples).",
        len(blocks),
        seconds / 60,
        passes / 60,
    )
    if limit is not None and seconds > limit:
        if options.epochs and passes > seconds - passes:
            advice = "learn for fewer epochs, or from fewer samples"
        else:
            _, widest, of_experts = max(
                (
                    (cost, name, len(shape) == 3)
                    for linears in blocks
                    for name, shape in linears.items()
                    for cost in [solver_cost(solved_shapes(shape), modalities, options)]
                ),
                default=(0.0, "", False),
            )
            advice = (
                "leave the dearest weights out with exclude="
                f"'{_pattern(widest, of_experts)}'"
            )
            if len(options.alphas) + len(options.separations) > 2:
                advice = f"give alpha and separation, not 'auto', {advice}"
        otherwise = "start more processes"
        if options.asymmetric_calibration:
            otherwise = "calibrate with asymmetric_calibration=False"
        raise ValueError(
            f"the calibration would take about {seconds / 60:.0f} minutes, more than the "
            f"{limit / 60:.0f} of max_seconds: {advice}, or {otherwise}."
        )
    return seconds
