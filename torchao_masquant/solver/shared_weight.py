# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The one set of integers that all modalities of a linear share."""

from dataclasses import dataclass, replace
from typing import Any, Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.number_formats import (
    NumberFormat,
    grid_of,
    number_format,
)
from torchao_masquant.options import Scheme
from torchao_masquant.solver.in_place import on_both_sides
from torchao_masquant.solver.rounding import (
    damped_factor,
    round_by_factor,
    rounding_order,
)
from torchao_masquant.tensor_subclasses import (
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)
from torchao_masquant.tensor_subclasses.float_weight import (
    dequantize_codes,
    float_scales,
    of_row_blocks,
    rounded_codes,
    steps,
)
from torchao_masquant.tensor_subclasses.weight_layout import group_count

__all__ = ["JointHessian", "SharedWeight", "round_to_nearest"]

# This share of the mean of a Hessian's diagonal is added to it: GPTQ's own choice.
_DAMPING = 0.01

# Noise of rounded activations below this share of the mean diagonal changes no integers that
# the damping does not change as well (8 bits add a ten thousandth, 4 bits a fiftieth).
_LEAST_NOISE = 3e-4

# Values of a weight whose scales are searched for together: their copies fit a core's cache,
# which makes the search eight times as fast.
_AT_A_TIME = 1 << 18

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass
class SharedWeight:
    """Integers, or codes of a number format, for ``W * s_base``, or for it in rotated channels, and what they stand for.

    Attributes:
        qdata: (N, K) int8.
        scale: (N, G) float32.
        zero_point: (N, G) int8, None where symmetric.
        row_scale: (N,) float32, None where the format has none.
        weight_format: of the codes; None: integers.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: Optional[torch.Tensor]
    row_scale: Optional[torch.Tensor] = None
    weight_format: Optional[str] = None

    def dequantize(self) -> torch.Tensor:
        """(N, K) float64, of rotated channels where there is a rotation."""
        if self.weight_format is not None:
            return dequantize_codes(
                self.qdata,
                number_format(self.weight_format),
                self.scale,
                self.row_scale,
            ).double()
        return dequantize_smoothed_weight(
            self.qdata, self.scale, zero_point=self.zero_point
        ).double()

    @classmethod
    def cat(cls, parts: "Sequence[SharedWeight]") -> "SharedWeight":
        """Of weights one below the other."""

        def joined(tensors: Sequence[Optional[torch.Tensor]]) -> Optional[torch.Tensor]:
            known = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(known) if known else None

        return cls(
            torch.cat([part.qdata for part in parts]),
            torch.cat([part.scale for part in parts]),
            joined([part.zero_point for part in parts]),
            joined([part.row_scale for part in parts]),
            parts[0].weight_format,
        )

    def split(self, rows: Sequence[int]) -> "list[SharedWeight]":
        """What :meth:`cat` put together, of so many rows each."""

        def shared_out(tensor: Optional[torch.Tensor]) -> Sequence[Any]:
            return [None] * len(rows) if tensor is None else tensor.split(list(rows))

        return [
            SharedWeight(*part, self.weight_format)
            for part in zip(
                shared_out(self.qdata),
                shared_out(self.scale),
                shared_out(self.zero_point),
                shared_out(self.row_scale),
            )
        ]


def round_to_nearest(
    weight: torch.Tensor,
    base_factor: torch.Tensor,
    bits: Scheme,
    importance: Optional[torch.Tensor] = None,
    hadamard_size: Optional[int] = None,
) -> SharedWeight:
    """Round each weight on its own, as converting without ready integers does.

    Args:
        weight: (N, K) floating point.
        base_factor: (K,) ``s_base``; in float32, as it will be held.
        bits: number formats.
        importance: (K,) float64, how much the square of an error of a channel of what is
            rounded weighs; if given, each scale is made for that share of its range that
            makes the weighted error least (a search over 0.6 to 1, or over what the
            number format tries). None: the whole range.
        hadamard_size: of the rotation of the smoothed weight; None for none.
    """
    pre_scale = base_factor.float().reciprocal()
    rows = max(1, _AT_A_TIME // weight.shape[1])
    if bits.weight_format is not None:
        # Rows that share scales stay together.
        together = number_format(bits.weight_format).rows
        rows = max(together, rows - rows % together)
    return SharedWeight.cat(
        [
            _rows_to_nearest(part, pre_scale, bits, importance, hadamard_size)
            for part in weight.split(rows)
        ]
    )


def _rows_to_nearest(
    weight: torch.Tensor,
    pre_scale: torch.Tensor,
    bits: Scheme,
    importance: Optional[torch.Tensor],
    hadamard_size: Optional[int],
) -> SharedWeight:
    n, k = weight.shape
    groups = 1 if bits.group_size is None else k // bits.group_size

    def rounded(clip: Optional[torch.Tensor]) -> SharedWeight:
        return SharedWeight(
            *quantize_smoothed_weight(
                target,
                ones,
                bits.weight_bits,
                bits.group_size,
                symmetric=bits.symmetric,
                clip=clip,
            )
        )

    target = hadamard_rotate(weight.float() / pre_scale, hadamard_size or 1)
    if bits.weight_format is not None:
        form = number_format(bits.weight_format)
        return _floats_to_nearest(target, form, bits.group_size, importance)
    ones = torch.ones_like(pre_scale)
    if importance is None:
        return rounded(None)
    best = torch.full_like(target[:, :groups], float("inf"))
    chosen = torch.ones_like(best)
    for clip in _CLIPS:
        clips = torch.full_like(chosen, clip)
        error = (rounded(clips).dequantize().float() - target).square()
        loss = (error * importance.float()).unflatten(1, (groups, k // groups)).sum(-1)
        better = loss < best
        best, chosen = (
            torch.where(better, loss, best),
            torch.where(better, clip, chosen),
        )
    return rounded(chosen)


def _floats_to_nearest(
    target: torch.Tensor,
    form: NumberFormat,
    group_size: Optional[int],
    importance: Optional[torch.Tensor],
) -> SharedWeight:
    groups = group_count(group_size, target.shape[1])

    def rounded(factor: Optional[torch.Tensor]) -> SharedWeight:
        scale, row_scale = float_scales(target, form, group_size, factor)
        codes = rounded_codes(target, form, scale, row_scale)
        return SharedWeight(codes, scale, None, row_scale, form.name)

    if importance is None or len(form.trials) == 1:
        return rounded(None)
    best = torch.full_like(target[:, :groups], float("inf"))
    chosen = torch.ones_like(best)
    for trial in form.trials:
        tried = rounded(torch.full_like(chosen, trial))
        error = (tried.dequantize().float() - target).square()
        loss = (error * importance.float()).unflatten(1, (groups, -1)).sum(-1)
        loss = of_row_blocks(loss, form.rows, torch.sum)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, trial, chosen)
    return rounded(chosen)


class JointHessian:
    """What an error of the shared weight costs all modalities together.

    Modality m meets ``V + P_m`` where it should meet W_m, its smoothed and rotated weight.
    With A_m the covariance of its smoothed and rotated tokens, e_m the variance that
    rounding adds to each of their channels and v_m the modality's share, the squared error
    over modalities is ``v_m (tr((W_m - P_m - V) A_m (...)^T) + e_m tr(V V^T))``, summed:
    up to a constant ``tr((T - V) H (T - V)^T)`` with

        H = sum_m v_m (A_m + e_m I),    T H = sum_m v_m (W_m - P_m) A_m

    so that one GPTQ of the target T is the least-squares rounding for all of them.
    Directions that no modality uses have no target of their own: the damping draws them to
    W_base. Noise that rounding adds pulls T towards zero where a direction carries less
    than that.

    Args:
        total: (K, K) ``sum_m v_m A_m``, in float64, or in float32 where that is to be the
            precision of its decomposition; lost.
        noise: ``sum_m v_m e_m``, scalar.

    Attributes:
        active: False where no modality varies at all, so that nothing can be weighed.
        importance: (K,) of the total's type, what the square of a channel's error costs after the
            channels that are rounded behind it have made up for what they can.
    """

    def __init__(self, total: torch.Tensor, noise: torch.Tensor):
        diagonal = total.diagonal().clone()
        mean = diagonal.mean()
        self.ridge = _DAMPING * mean
        self.noise = noise if noise > _LEAST_NOISE * mean else torch.zeros_like(mean)
        self.active = bool(self.ridge > 0)
        if not self.active:
            return
        self.order = rounding_order(diagonal)
        ordered = on_both_sides(total, lambda rows: rows[:, self.order])
        self._lower = damped_factor(ordered, self.ridge + self.noise)
        self.importance = torch.empty_like(diagonal)
        self.importance[self.order] = self._lower.diagonal().square()

    def target(self, base: torch.Tensor) -> torch.Tensor:
        """T where all modalities want W_base and have no pair.

        Args:
            base: (N, K) float64 W_base.
        """
        if not self.noise:
            return base
        return base - self.noise * self._solved(base)

    def target_of(self, base: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """T where modalities want different things.

        Args:
            base: (N, K) float64 W_base.
            wanted: (N, K) float64 ``sum_m v_m (W_m - P_m) A_m``.
        """
        return self._solved(wanted + self.ridge * base)

    def _solved(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows H^-1``."""
        # Not cholesky_solve, which copies the factor.
        half = torch.linalg.solve_triangular(
            self._lower, rows[:, self.order].t().to(self._lower.dtype), upper=False
        )
        solved = torch.empty_like(rows)
        solved[:, self.order] = (
            torch.linalg.solve_triangular(self._lower.mT, half, upper=True)
            .t()
            .to(rows.dtype)
        )
        return solved

    def rounded(
        self, target: torch.Tensor, start: SharedWeight, bits: Scheme
    ) -> SharedWeight:
        """Integers that serve all modalities: GPTQ of T.

        Args:
            target: (N, K) float64 T.
            start: whose scales are kept.
            bits: number formats.
        """
        zero_point, scale = start.zero_point, steps(start.scale, start.row_scale)
        # Integers need no more than float32; what they are found from was solved for in
        # float64.
        qdata = round_by_factor(
            target[:, self.order].float(),
            self._lower.float(),
            self.order,
            scale,
            torch.zeros_like(scale) if zero_point is None else zero_point.float(),
            grid_of(bits.weight_bits, bits.weight_format),
        )
        return replace(start, qdata=qdata)
