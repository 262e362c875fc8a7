# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory, time and traffic of calibration and of inference."""

from dataclasses import dataclass
from typing import Optional, Sequence

from torchao_masquant.calibration import statistics
from torchao_masquant.calibration.passes import in_passes
from torchao_masquant.options import (
    MAX_STATISTICS_BYTES,
    Scheme,
    SolverOptions,
    resolve_rank,
)
from torchao_masquant.planning.machine import Machine
from torchao_masquant.planning.skeleton import InputGroup, LinearShape, Skeleton
from torchao_masquant.planning.weight_bytes import Compensation, weight_bytes
from torchao_masquant.solver.cost import solver_bytes, solver_work

__all__ = [
    "CalibrationPlan",
    "InferencePlan",
    "linear_seconds",
    "plan_calibration",
    "plan_inference",
    "statistics_bytes",
]


# Runs of one sample beside those of all: through the decoder's own forward and block by
# block, to compare; and of each block, to see which linears share their input.
_RUNS_OF_ONE_SAMPLE = 3


@dataclass(frozen=True)
class CalibrationPlan:
    """Of calibration block by block, the statistics' data shared by the devices.

    Attributes:
        front_bytes: weights that samples need on their way to the decoder.
        block_bytes: weights of one decoder layer.
        statistics_bytes: of the inputs of that layer's linears, those of one pass.
        workspace_bytes: of the solver, for the widest of them.
        device_bytes: peak of a device: of the weights in front, or of a layer's weights
            with its statistics and the solver. Statistics that were solved from are
            given back.
        activation_bytes: what goes into a block and comes out of it, for all samples,
            on the CPU or on disk.
        forward_seconds: of the samples through the decoder.
        statistics_seconds: of their covariances.
        solve_seconds: of all the inputs.
        read_bytes: from disk.
        written_bytes: to disk, of the first of the schemes.
        reduced_bytes: sent by each device, for statistics that are added up.
    """

    front_bytes: int
    block_bytes: int
    statistics_bytes: int
    workspace_bytes: int
    device_bytes: int
    activation_bytes: int
    forward_seconds: float
    statistics_seconds: float
    solve_seconds: float
    read_bytes: int
    written_bytes: int
    reduced_bytes: int

    @property
    def seconds(self) -> float:
        """Of all of it; disks and links are taken to keep up, towers to be quick."""
        return self.forward_seconds + self.statistics_seconds + self.solve_seconds


@dataclass(frozen=True)
class InferencePlan:
    """Of tensor parallel inference.

    Attributes:
        scheme: its name, or "dense".
        weight_bytes: of the whole model, all that goes with it counted in.
        device_weight_bytes: of the fullest device.
        cache_bytes: of keys and values on each device.
        device_bytes: of both.
        prefill_seconds: of the decoder, for all tokens of the context, and of the head
            for the last.
        decode_seconds: of both for one more token.
        sent_bytes: by each device, for one token.
        reason: why it can't be done; None where it can.
    """

    scheme: str
    weight_bytes: int
    device_weight_bytes: int
    cache_bytes: int
    device_bytes: int
    prefill_seconds: float
    decode_seconds: float
    sent_bytes: float
    reason: Optional[str] = None


def statistics_bytes(groups: Sequence[InputGroup], modalities: int) -> int:
    """Of the covariances, sums, ranges and sampled tokens of inputs."""
    return sum(statistics.statistics_bytes(g.k, modalities, True) for g in groups)


def plan_calibration(
    skeleton: Skeleton,
    machine: Machine,
    scheme: Scheme,
    compensation: Compensation,
    *,
    samples: int,
    tokens: int,
    devices: int = 1,
    options: SolverOptions = SolverOptions(),
    max_statistics_bytes: int = MAX_STATISTICS_BYTES,
) -> CalibrationPlan:
    """What calibration will take.

    Args:
        samples: number of them.
        tokens: of each.
        devices: that share the samples, and the inputs to solve for.
        options: of the solution.
        max_statistics_bytes: bound of the statistics of one pass over the samples.
    """
    modalities = compensation.modalities
    per_block: dict[str, list[InputGroup]] = {}
    for group in skeleton.groups:
        per_block.setdefault(group.block, []).append(group)
    passes = {
        name: [
            [groups[index] for index in indices]
            for indices in in_passes(
                [statistics_bytes([g], modalities) for g in groups],
                max_statistics_bytes,
            )
        ]
        for name, groups in per_block.items()
    }
    every = [groups for of_block in passes.values() for groups in of_block]
    runs = max((len(of_block) for of_block in passes.values()), default=1)
    block = skeleton.block_values * skeleton.element
    front = skeleton.other_values
    if skeleton.head is not None:
        front -= skeleton.head.n * skeleton.head.k
    solving = max(
        (_solving_bytes(groups, modalities, options, devices) for groups in every),
        default=0,
    )
    share = samples * tokens / devices
    macs = sum(share * g.k * g.k for g in skeleton.groups)
    call = _decoder_seconds(skeleton, machine, None, compensation, tokens=tokens)
    solves = [
        solver_work(g.shapes, modalities, options).dot(machine.solver)
        for g in skeleton.groups
    ]
    return CalibrationPlan(
        front_bytes=front * skeleton.element,
        block_bytes=block,
        statistics_bytes=max(
            (statistics_bytes(groups, modalities) for groups in every), default=0
        ),
        workspace_bytes=max(
            (_workspace(g, modalities, options) for g in skeleton.groups), default=0
        ),
        device_bytes=max(front * skeleton.element, block + solving),
        activation_bytes=2 * samples * tokens * skeleton.hidden * skeleton.element,
        forward_seconds=call * (runs * samples / devices + _RUNS_OF_ONE_SAMPLE),
        statistics_seconds=macs * machine.statistics_per_mac,
        solve_seconds=sum(solves) / devices,
        read_bytes=skeleton.values * skeleton.element,
        written_bytes=_model_bytes(skeleton, scheme, compensation, 1),
        reduced_bytes=round(
            2 * (devices - 1) / devices * statistics_bytes(skeleton.groups, modalities)
        ),
    )


def _solving_bytes(
    groups: Sequence[InputGroup], modalities: int, options: SolverOptions, devices: int
) -> int:
    """Peak of solving for the inputs of one pass, with their statistics."""
    peaks, found = [], 0
    for index, group in enumerate(groups):
        # One device solves for one after the other, and gives back their covariances.
        left = groups[index:] if devices == 1 else groups
        peaks.append(
            statistics_bytes(left, modalities)
            + _workspace(group, modalities, options)
            + found
        )
        found += group.values
    return max(peaks, default=0)


def _workspace(group: InputGroup, modalities: int, options: SolverOptions) -> int:
    """Of the solver, for one input."""
    return max(
        solver_bytes(n, k, group.values, modalities, options) for n, k in group.shapes
    )


def plan_inference(
    skeleton: Skeleton,
    machine: Machine,
    scheme: Optional[Scheme],
    compensation: Compensation,
    *,
    context: int,
    batch: int = 1,
    devices: int = 1,
    others_share: float = 0.5,
) -> InferencePlan:
    """What inference will take.

    Args:
        scheme: None for the dense model.
        context: tokens of a sequence.
        batch: sequences.
        devices: that the model is sharded over, as its class's plan says.
        others_share: of the context's tokens, those that are not of the base modality.
    """
    weights = _model_bytes(skeleton, scheme, compensation, 1)
    mine = _model_bytes(skeleton, scheme, compensation, devices)
    cache = skeleton.cache_bytes(context * batch) // devices
    element = skeleton.element

    # Two sums for each decoder layer, as a ring: after attention, and after the MLP.
    sent = 4 * skeleton.blocks * skeleton.hidden * element * (devices - 1) / devices
    link = sent / machine.link_bytes_per_second

    def call(tokens: int, cached: int, others: float) -> float:
        """Of so many tokens of each sequence."""
        seconds = _decoder_seconds(
            skeleton,
            machine,
            scheme,
            compensation,
            tokens=tokens * batch,
            sequences=batch,
            cached=cached,
            others=others,
            devices=devices,
        )
        if skeleton.head is not None:
            seconds += linear_seconds(
                machine,
                None,
                skeleton.head,
                batch,
                element,
                compensation,
                ranks=devices,
            )
        return seconds + link * tokens * batch

    prefill = call(context, 0, others_share * context * batch)
    decode = call(1, context, 0)
    return InferencePlan(
        scheme="dense" if scheme is None else scheme.name,
        weight_bytes=weights,
        device_weight_bytes=mine,
        cache_bytes=cache,
        device_bytes=mine + cache,
        prefill_seconds=prefill,
        decode_seconds=decode,
        sent_bytes=sent,
        reason=_reason(skeleton, scheme, devices),
    )


def _decoder_seconds(
    skeleton: Skeleton,
    machine: Machine,
    scheme: Optional[Scheme],
    compensation: Compensation,
    *,
    tokens: int,
    sequences: int = 1,
    cached: int = 0,
    others: float = 0,
    devices: int = 1,
) -> float:
    """Of one call of all decoder layers.

    Args:
        tokens: of the call, of all sequences together.
        sequences: that they are of.
        cached: tokens of a sequence that came before.
        others: of the tokens, those that are not of the base modality.
        devices: that share it.
    """
    seconds = sum(
        linear_seconds(
            machine,
            scheme,
            x,
            tokens,
            skeleton.element,
            compensation,
            others=others,
            ranks=devices,
        )
        for x in skeleton.linears
    )
    own = tokens / sequences
    width = skeleton.heads * skeleton.head_dim
    return seconds + machine.rest.seconds(
        skeleton.blocks,
        tokens * sum(x.n + x.k for x in skeleton.linears),
        2 * skeleton.blocks * tokens * (cached + (own + 1) / 2) * width / devices,
        skeleton.cache_bytes(sequences * cached + tokens) / devices,
        2 * skeleton.blocks * width * (sequences * cached + tokens) / devices,
    )


def linear_seconds(
    machine: Machine,
    scheme: Optional[Scheme],
    shape: LinearShape,
    tokens: float,
    element: int,
    compensation: Compensation,
    *,
    others: float = 0,
    ranks: int = 1,
) -> float:
    """Of one call of a linear on each of the ranks that share it.

    Args:
        scheme: None for a dense one.
        tokens: of the call.
        element: bytes of a dense value.
        others: of the tokens, those that are not of the base modality.
    """
    n, k = shape.n, shape.k
    shared = ranks if shape.sharded else 1
    macs = tokens * n * k
    if scheme is None:
        rates, size = machine.linear["dense"], n * k * element // shared
    else:
        rates = machine.linear[_kind(scheme)]
        size = weight_bytes(
            n, k, scheme, compensation, ranks=ranks, sharded=shape.sharded or None
        )
        macs += others * resolve_rank(compensation.rank, n, k) * (n + k)
    return rates.seconds(macs / shared, size, tokens * (n + k) / shared)


def _kind(scheme: Scheme) -> str:
    if scheme.weight_only:
        return "w4a16"
    return "w8a8" if scheme.weight_bits == 8 else "w4a8"


def _model_bytes(
    skeleton: Skeleton,
    scheme: Optional[Scheme],
    compensation: Compensation,
    ranks: int,
) -> int:
    """Of the fullest of the ranks."""
    others = skeleton.other_values - skeleton.sharded_others
    others += -(-skeleton.sharded_others // ranks)
    size = others * skeleton.element
    for x in skeleton.linears:
        if scheme is None:
            size += x.n * x.k * skeleton.element // (ranks if x.sharded else 1)
        else:
            size += weight_bytes(
                x.n, x.k, scheme, compensation, ranks=ranks, sharded=x.sharded or None
            )
    return size


def _reason(
    skeleton: Skeleton, scheme: Optional[Scheme], devices: int
) -> Optional[str]:
    """Why a model can't be sharded so, as ``tensor_parallel`` would say."""
    for kind, heads in (("heads", skeleton.heads), ("kv heads", skeleton.kv_heads)):
        if heads % devices:
            return f"{devices} devices can't share {heads} {kind}"
    for x in skeleton.linears:
        size = x.k if x.sharded == "columns" else x.n
        if x.sharded and size % devices:
            return f"{devices} devices can't share {size} channels of {x.name}"
        if scheme is None:
            continue
        group = scheme.group_size or 1
        if x.k % group:
            return f"groups of {group} do not divide the {x.k} channels of {x.name}"
        if x.sharded == "columns" and x.k // devices % group:
            return f"{devices} devices can't share the groups of {group} of {x.name}"
    return None
