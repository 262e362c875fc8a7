# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory and traffic of calibration and of inference."""

from dataclasses import dataclass
from typing import Optional, Sequence

from torchao_masquant.calibration.passes import in_passes
from torchao_masquant.options import MAX_STATISTICS_BYTES, Scheme, SolverOptions
from torchao_masquant.planning.skeleton import InputGroup, Skeleton
from torchao_masquant.solver.cost import solver_bytes
from torchao_masquant.statistics import input_statistics as statistics
from torchao_masquant.weight_bytes import Compensation, weight_bytes

__all__ = [
    "CalibrationPlan",
    "InferencePlan",
    "plan_calibration",
    "plan_inference",
    "statistics_bytes",
]


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
    read_bytes: int
    written_bytes: int
    reduced_bytes: int


@dataclass(frozen=True)
class InferencePlan:
    """Of tensor parallel inference.

    Attributes:
        scheme: its name, or "dense".
        weight_bytes: of the whole model, all that goes with it counted in.
        device_weight_bytes: of the fullest device.
        cache_bytes: of keys and values on each device.
        device_bytes: of both.
        sent_bytes: by each device, for one token.
        reason: why it can't be done; None where it can.
    """

    scheme: str
    weight_bytes: int
    device_weight_bytes: int
    cache_bytes: int
    device_bytes: int
    sent_bytes: float
    reason: Optional[str] = None


def statistics_bytes(groups: Sequence[InputGroup], modalities: int) -> int:
    """Of the covariances, sums, ranges and sampled tokens of inputs."""
    return sum(statistics.statistics_bytes(g.k, modalities, True) for g in groups)


def plan_calibration(
    skeleton: Skeleton,
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
    passes = [
        [groups[index] for index in indices]
        for groups in per_block.values()
        for indices in in_passes(
            [statistics_bytes([g], modalities) for g in groups], max_statistics_bytes
        )
    ]
    block = skeleton.block_values * skeleton.element
    front = skeleton.other_values
    if skeleton.head is not None:
        front -= skeleton.head.n * skeleton.head.k
    solving = max(
        (_solving_bytes(groups, modalities, options, devices) for groups in passes),
        default=0,
    )
    return CalibrationPlan(
        front_bytes=front * skeleton.element,
        block_bytes=block,
        statistics_bytes=max(
            (statistics_bytes(groups, modalities) for groups in passes), default=0
        ),
        workspace_bytes=max(
            (_workspace(g, modalities, options) for g in skeleton.groups), default=0
        ),
        device_bytes=max(front * skeleton.element, block + solving),
        activation_bytes=2 * samples * tokens * skeleton.hidden * skeleton.element,
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
        solver_bytes(n, group.k, group.values, modalities, options)
        for n in group.outputs
    )


def plan_inference(
    skeleton: Skeleton,
    scheme: Optional[Scheme],
    compensation: Compensation,
    *,
    context: int,
    batch: int = 1,
    devices: int = 1,
) -> InferencePlan:
    """What inference will take.

    Args:
        scheme: None for the dense model.
        context: tokens of a sequence.
        batch: sequences.
        devices: that the model is sharded over, as its class's plan says.
    """
    weights = _model_bytes(skeleton, scheme, compensation, 1)
    mine = _model_bytes(skeleton, scheme, compensation, devices)
    cache = skeleton.cache_bytes(context * batch) // devices
    # Two sums for each decoder layer, as a ring: after attention, and after the MLP.
    summed = 2 * skeleton.blocks * skeleton.hidden * skeleton.element
    sent = 2 * summed * (devices - 1) / devices
    return InferencePlan(
        scheme="dense" if scheme is None else scheme.name,
        weight_bytes=weights,
        device_weight_bytes=mine,
        cache_bytes=cache,
        device_bytes=mine + cache,
        sent_bytes=sent,
        reason=_reason(skeleton, scheme, devices),
    )


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
