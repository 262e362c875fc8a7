# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""GPTQ: rounding a weight so that the errors of its channels make up for each other."""

import torch

from torchao_masquant.kernels.number_formats import Grid

__all__ = ["damped_factor", "round_by_factor", "rounding_order"]

_BLOCK = 64


def rounding_order(diagonal: torch.Tensor) -> torch.Tensor:
    """(K,) indices of the channels, those to be rounded first at the end.

    Args:
        diagonal: (K,) of the Hessian; the largest are rounded first (GPTQ's "act
            order"), of equals the first.
    """
    return torch.argsort(diagonal, descending=True, stable=True).flip(0)


def damped_factor(hessian: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of ``H + ridge I``, in the memory of H.

    Args:
        hessian: (K, K) floating point, symmetric positive semi-definite; lost.
        ridge: scalar.

    Raises:
        torch.linalg.LinAlgError: it is far from positive semi-definite.
    """
    hessian.diagonal().add_(ridge)
    # LAPACK's order of elements, so that nothing is copied.
    columns = hessian.mT
    torch.linalg.cholesky(columns, out=columns)
    return columns


def round_by_factor(
    target: torch.Tensor,
    lower: torch.Tensor,
    order: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """GPTQ of a target T for a Hessian ``L L^T``.

    The error is ``||E L||^2`` with ``E = T - V``. Of the columns of E L only those up to j
    hold channel j, so that channels are rounded from the last to the first, each to what
    makes its own column least: ``V_j`` next to ``T_j + sum_{i > j} E_i L_ij / L_jj``. That
    is what GPTQ (arXiv 2210.17323) does with a Cholesky factor of the inverse, which is
    not needed so.

    Args:
        target: (N, K) floating point, as the factor and the grids; channels in the order
            of the factor.
        lower: (K, K) L.
        order: (K,) which channel of the weight each of the factor is.
        scale: (N, G), each for K / G neighbours.
        zero_point: (N, G).
        grid: what is rounded to, times a scale.

    Returns:
        (N, K) int8 codes, channels in the order of the weight.
    """
    k = target.shape[1]
    places = order.tolist()
    width = k // scale.shape[1]
    pivots = lower.diagonal()
    # Channels as rows: they are worked on one by one. What is rounded turns into errors.
    errors = target.t().contiguous()
    scale, zero_point = scale.t().contiguous(), zero_point.t().contiguous()
    q = torch.empty_like(errors)
    for end in range(k, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        moved = lower[end:, start:end].t() @ errors[end:]
        for at in range(end - 1, start - 1, -1):
            step, zero = scale[places[at] // width], zero_point[places[at] // width]
            wanted = errors[at] + moved[at - start] / pivots[at]
            levels = grid.nearest(wanted / step + zero)
            errors[at] -= (levels - zero) * step
            moved[: at - start].addr_(lower[at, start:at], errors[at])
            q[places[at]] = levels
    return grid.encode(q).t().contiguous()
