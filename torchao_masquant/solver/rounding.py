# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""GPTQ: rounding a weight so that the errors of its channels make up for each other."""

import torch

__all__ = ["gptq_round"]

_BLOCK = 64


def gptq_round(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    damping: float,
) -> torch.Tensor:
    """Integers q that make ``tr((W - V) H (W - V)^T)`` small, ``V = scale (q - zero_point)``.

    GPTQ (arXiv 2210.17323): input channels are rounded one after the other, those with
    the largest diagonal of H first, and what rounding one costs is taken up by those
    that are left, ``W[:, j:] -= e U[i, j:] / U[i, i]`` with the Cholesky factor
    ``U^T U = H^-1``.

    Args:
        weight: (N, K) float64.
        hessian: (K, K) float64, positive semi-definite.
        scale: (N, G) float64, each for K / G neighbours.
        zero_point: (N, G) float64.
        quant_min: smallest integer.
        quant_max: largest integer.
        damping: above zero; this share of the mean diagonal is added to it.

    Returns:
        (N, K) int8.

    Raises:
        ValueError: the Hessian is zero.
        torch.linalg.LinAlgError: it is far from positive semi-definite.
    """
    k = weight.shape[1]
    mean = hessian.diagonal().mean()
    if not mean > 0:
        raise ValueError("GPTQ needs a Hessian that is not zero.")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damping * mean)
    lower = torch.linalg.cholesky(hessian)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    width = k // scale.shape[1]
    weight = weight[:, order]
    group = order // width
    q = torch.empty_like(weight)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, errors = weight[:, start:end], torch.empty_like(weight[:, start:end])
        for i in range(end - start):
            at = start + i
            step, zero = scale[:, group[at]], zero_point[:, group[at]]
            levels = (block[:, i] / step + zero).round().clamp(quant_min, quant_max)
            q[:, at] = levels
            errors[:, i] = (block[:, i] - (levels - zero) * step) / upper[at, at]
            block[:, i + 1 :] -= errors[:, i, None] * upper[at, at + 1 : end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    rounded = torch.empty_like(q)
    rounded[:, order] = q
    return rounded.to(torch.int8)
