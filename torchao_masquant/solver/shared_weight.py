# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The one set of integers that all modalities of a linear share."""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
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
    """Integers for ``W * s_base``, or for it in rotated channels, and what they stand for.

    Attributes:
        qdata: (N, K) int8.
        scale: (N, G) float32.
        zero_point: (N, G) int8, None where symmetric.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: Optional[torch.Tensor]

    def dequantize(self) -> torch.Tensor:
        """(N, K) float64, of rotated channels where there is a rotation."""
        return dequantize_smoothed_weight(
            self.qdata, self.scale, zero_point=self.zero_point
        ).double()

    @classmethod
    def cat(cls, parts: "Sequence[SharedWeight]") -> "SharedWeight":
        """Of weights one below the other."""
        zero_points = [part.zero_point for part in parts]
        known = [zero for zero in zero_points if zero is not None]
        return cls(
            torch.cat([part.qdata for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(known) if known else None,
        )

    def split(self, rows: Sequence[int]) -> "list[SharedWeight]":
        """What :meth:`cat` put together, of so many rows each."""
        zero_points = (
            [None] * len(rows)
            if self.zero_point is None
            else self.zero_point.split(list(rows))
        )
        return [
            SharedWeight(*part)
            for part in zip(
                self.qdata.split(list(rows)), self.scale.split(list(rows)), zero_points
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
        bits: integer formats.
        importance: (K,) float64, how much the square of an error of a channel of what is
            rounded weighs; if given, each scale is made for that share of its range that
            makes the weighted error least (a search over 0.6 to 1). None: the whole
            range.
        hadamard_size: of the rotation of the smoothed weight; None for none.
    """
    pre_scale = base_factor.float().reciprocal()
    rows = max(1, _AT_A_TIME // weight.shape[1])
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
            bits: integer formats.
        """
        zero_point = start.zero_point
        # Integers need no more than float32; what they are found from was solved for in
        # float64.
        qdata = round_by_factor(
            target[:, self.order].float(),
            self._lower.float(),
            self.order,
            start.scale.float(),
            torch.zeros_like(start.scale, dtype=torch.float32)
            if zero_point is None
            else zero_point.float(),
            -(2 ** (bits.weight_bits - 1)),
            2 ** (bits.weight_bits - 1) - 1,
        )
        return SharedWeight(qdata, start.scale, zero_point)
