# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory, time and traffic of calibration and of inference."""

from dataclasses import dataclass
from typing import Optional, Sequence

from torchao_masquant.calibration.statistics import SAMPLE_TOKENS
from torchao_masquant.planning.machine import Machine
from torchao_masquant.planning.skeleton import InputGroup, LinearShape, Skeleton
from torchao_masquant.planning.weight_bytes import Compensation, weight_bytes
from torchao_masquant.schemes import Scheme
from torchao_masquant.solver.compensation import resolve_rank

__all__ = [
    "CalibrationPlan",
    "InferencePlan",
    "linear_seconds",
    "plan_calibration",
    "plan_inference",
    "statistics_bytes",
]


@dataclass(frozen=True)
class CalibrationPlan:
    """Of calibration block by block, the statistics' data shared by the devices.

    Attributes:
        block_bytes: weights of one decoder layer.
        statistics_bytes: of the inputs of that layer's linears.
        workspace_bytes: of the solver, for the widest of them.
        device_bytes: peak of a device, all of the above.
        activation_bytes: what goes into a block and comes out of it, for all samples,
            on the CPU or on disk.
        forward_seconds: of the samples through the decoder's linears.
        statistics_seconds: of their covariances.
        solve_seconds: of all the inputs.
        read_bytes: from disk.
        written_bytes: to disk, of the first of the schemes.
        reduced_bytes: sent by each device, for statistics that are added up.
    """

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
        """Of all of it; disks and links are taken to keep up."""
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
        prefill_seconds: of the decoder's linears, for all tokens of the context.
        decode_seconds: of them, and of reading the cache, for one more token.
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
    return sum(
        modalities * (8 * g.k * g.k + 3 * 8 * g.k + 4 * SAMPLE_TOKENS * g.k)
        for g in groups
    )


def plan_calibration(
    skeleton: Skeleton,
    machine: Machine,
    scheme: Scheme,
    compensation: Compensation,
    *,
    tokens: int,
    devices: int = 1,
) -> CalibrationPlan:
    """What calibration will take.

    Args:
        tokens: of all samples together.
        devices: that share the samples, and the inputs to solve for.
    """
    modalities = compensation.modalities
    per_block: dict[str, list[InputGroup]] = {}
    for group in skeleton.groups:
        per_block.setdefault(group.block, []).append(group)
    fullest = max(
        (statistics_bytes(groups, modalities) for groups in per_block.values()),
        default=0,
    )
    workspace = max(machine.solver.workspace_of(g.k, g.n) for g in skeleton.groups)
    block = skeleton.block_values * skeleton.element
    share = tokens / devices
    macs = sum(share * g.k * g.k for g in skeleton.groups)
    forward = sum(
        linear_seconds(machine, None, x, share, skeleton.element, compensation)
        for x in skeleton.linears
    )
    solves = [machine.solver.seconds_of(g.k, g.n, modalities) for g in skeleton.groups]
    sums = statistics_bytes(skeleton.groups, modalities)
    return CalibrationPlan(
        block_bytes=block,
        statistics_bytes=fullest,
        workspace_bytes=round(workspace),
        device_bytes=block + fullest + round(workspace),
        activation_bytes=round(2 * tokens * skeleton.hidden * skeleton.element),
        forward_seconds=forward,
        statistics_seconds=macs * machine.statistics_per_mac,
        solve_seconds=sum(solves) / devices,
        read_bytes=skeleton.values * skeleton.element,
        written_bytes=_model_bytes(skeleton, scheme, compensation, 1),
        reduced_bytes=round(2 * (devices - 1) / devices * sums),
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
    element = skeleton.element

    def linears(tokens: float, others: float) -> float:
        return sum(
            linear_seconds(
                machine,
                scheme,
                x,
                tokens,
                element,
                compensation,
                others=others,
                ranks=devices,
            )
            for x in skeleton.linears
        )

    # Two sums for each decoder layer, as a ring: after attention, and after the MLP.
    sent = 4 * skeleton.blocks * skeleton.hidden * element * (devices - 1) / devices
    link = sent / machine.link_bytes_per_second
    dense = machine.linear["dense"]
    prefill = linears(context * batch, context * batch / 2) + link * context * batch
    decode = linears(batch, 0) + link * batch + cache * dense.per_weight_byte
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
