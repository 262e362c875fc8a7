# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The one set of integers that all modalities of a linear share."""

from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from torchao_masquant.schemes import Scheme
from torchao_masquant.solver.rounding import (
    damped_factor,
    round_by_factor,
    rounding_order,
)
from torchao_masquant.tensor_subclasses import (
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)

__all__ = ["ROWS", "SharedWeight", "round_jointly", "round_to_nearest"]

# Of the mean diagonal of a Hessian, added to it: GPTQ's own choice.
_DAMPING = 0.01

#: Of a matrix (K, K) that are worked on at a time, so that no second one is needed.
ROWS = 128

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass
class SharedWeight:
    """Integers for ``W * s_base`` and what they stand for.

    Attributes:
        qdata: (N, K) int8.
        scale: (N, G) float32.
        zero_point: (N, G) int8, None where symmetric.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: Optional[torch.Tensor]

    def dequantize(self) -> torch.Tensor:
        """(N, K) float64."""
        return dequantize_smoothed_weight(
            self.qdata, self.scale, zero_point=self.zero_point
        ).double()


def round_to_nearest(
    weight: torch.Tensor,
    base_factor: torch.Tensor,
    bits: Scheme,
    importance: Optional[torch.Tensor] = None,
) -> SharedWeight:
    """Round each weight on its own, as converting without ready integers does.

    Args:
        weight: (N, K) floating point.
        base_factor: (K,) ``s_base``; in float32, as it will be held.
        bits: integer formats.
        importance: (K,) float64, how much the square of an error of an input channel
            weighs; if given, each scale is made for that share of its range that makes
            the weighted error least (a search over 0.6 to 1). None: the whole range.
    """
    pre_scale = base_factor.float().reciprocal()
    n, k = weight.shape
    groups = 1 if bits.group_size is None else k // bits.group_size

    def rounded(clip: Optional[torch.Tensor]) -> SharedWeight:
        return SharedWeight(
            *quantize_smoothed_weight(
                weight,
                pre_scale,
                bits.weight_bits,
                bits.group_size,
                symmetric=bits.symmetric,
                clip=clip,
            )
        )

    if importance is None:
        return rounded(None)
    target = weight.float() / pre_scale
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


def round_jointly(
    weight: torch.Tensor,
    factors: Sequence[torch.Tensor],
    pairs: Sequence[Optional[tuple[torch.Tensor, torch.Tensor]]],
    covariances: Sequence[torch.Tensor],
    importances: Sequence[float],
    start: SharedWeight,
    bits: Scheme,
    products: Optional[Sequence[torch.Tensor]] = None,
) -> SharedWeight:
    """Integers that serve all modalities: GPTQ with a modality-balanced Hessian.

    Modality m meets ``V + P_m`` where it should meet ``W s_m``. With C_m its smoothed
    covariance, E_m the energy of its output and v_m its weight, the sum over modalities
    of ``v_m / E_m tr((W s_m - P_m - V) C_m (...)^T)`` is, up to a constant,
    ``tr((T - V) H (T - V)^T)`` with

        H = sum_m v_m / E_m C_m,    T H = sum_m v_m / E_m (W s_m - P_m) C_m

    so that one GPTQ of the target T is the least-squares rounding for all of them.
    Directions that no modality uses have no target of their own: the damping draws
    them to ``W s_base``.

    Args:
        weight: (N, K) W.
        factors: (K,) ``s_m`` of each modality, base first.
        pairs: L1 (K, r), L2 (r, N) of each modality, None where it has none.
        covariances: (K, K) float64 centred covariance of ``x`` of each modality.
        importances: v_m.
        start: whose scales are kept.
        bits: integer formats.
        products: (N, K) float64 ``W C_m`` of each modality, where they are known.

    Returns:
        The new integers; ``start`` itself where no modality varies at all.
    """
    weight = weight.double()
    if products is None:
        products = [weight @ covariance for covariance in covariances]
    shares = []
    for product, importance in zip(products, importances):
        energy = (product * weight).sum()
        heard = energy > 0 and importance > 0
        shares.append(importance / energy if heard else torch.zeros_like(energy))
    met = list(zip(shares, factors, covariances))
    diagonal = torch.zeros_like(factors[0])
    for share, factor, covariance in met:
        diagonal += share * covariance.diagonal() / factor.square()
    ridge = _DAMPING * diagonal.mean()
    if not ridge > 0:
        return start
    order = rounding_order(diagonal)
    hessian = torch.zeros_like(covariances[0])
    aim = ridge * weight * factors[0]
    for (share, factor, covariance), product, pair in zip(met, products, pairs):
        if not share > 0:
            continue
        _add_in_order(hessian, covariance, factor, share, order)
        wanted = product
        if pair is not None:
            down, up = pair[0].double() / factor[:, None], pair[1].double()
            wanted = wanted - up.t() @ (down.t() @ covariance)
        aim += wanted * (share / factor)
    lower = damped_factor(hessian, ridge)
    # Not cholesky_solve, which copies the factor.
    half = torch.linalg.solve_triangular(lower, aim[:, order].t(), upper=False)
    target = torch.linalg.solve_triangular(lower.mT, half, upper=True).t()
    zero_point = start.zero_point
    qdata = round_by_factor(
        target,
        lower,
        order,
        start.scale.double(),
        torch.zeros_like(start.scale.double())
        if zero_point is None
        else zero_point.double(),
        -(2 ** (bits.weight_bits - 1)),
        2 ** (bits.weight_bits - 1) - 1,
    )
    return SharedWeight(qdata, start.scale, zero_point)


def _add_in_order(
    total: torch.Tensor,
    covariance: torch.Tensor,
    factor: torch.Tensor,
    share: torch.Tensor,
    order: torch.Tensor,
) -> None:
    """Add ``share C / (s s^T)`` in another order of channels, a few rows at a time."""
    scaled = 1 / factor[order]
    for rows, place, own in zip(
        total.split(ROWS), order.split(ROWS), scaled.split(ROWS)
    ):
        rows.add_(covariance[place][:, order] * torch.outer(share * own, scaled))
