# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the low-rank pairs of a weight are held: in 16 bits, or in 8."""

from typing import Sequence

import torch
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine_with_min_max,
    quantize_affine,
)

__all__ = ["copy_components", "low_rank_dtype", "quantize_low_rank_pair"]

# Both ends, not -128: integers that are quantized again come out the same.
_QUANT_MAX = 127


def low_rank_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Type of a low-rank pair: the weight's own where that has 16 bits, else bfloat16.

    A pair repairs a part of the output; 8 bits of mantissa put its rounding 50 dB below
    what it repairs, which float32 weights need no more of than bfloat16 ones.
    """
    return weight_dtype if weight_dtype == torch.float16 else torch.bfloat16


def quantize_low_rank_pair(
    l1: torch.Tensor, l2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``L1 L2 ~ (q_1 * s) q_2`` in 8 bits, one factor per component of the rank.

    Symmetric round-to-nearest, ``max / 127`` per column of L1 and per row of L2. The
    scales of a column and of its row always meet, so that only their product is kept;
    quantizing ``q_1 * s`` and ``q_2`` again gives them back.

    Args:
        l1: (K, R) floating point, R at least 1.
        l2: (R, N) floating point.

    Returns:
        ``q_1`` (K, R) int8, ``q_2`` (R, N) int8 and ``s`` (R,) float32.
    """
    down, down_scale = _quantize_rows(l1.t())
    up, up_scale = _quantize_rows(l2)
    return down.t().contiguous(), up, down_scale * up_scale


def _quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, L) int8 and (R,) float32."""
    values = values.float().contiguous()
    scale, zero_point = choose_qparams_affine_with_min_max(
        values.amin(-1, keepdim=True),
        values.amax(-1, keepdim=True),
        MappingType.SYMMETRIC,
        (1, values.shape[1]),
        torch.int8,
        quant_min=-_QUANT_MAX,
        quant_max=_QUANT_MAX,
        eps=torch.finfo(torch.float32).tiny,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    qdata = quantize_affine(
        values,
        (1, values.shape[1]),
        scale,
        zero_point,
        torch.int8,
        quant_min=-_QUANT_MAX,
        quant_max=_QUANT_MAX,
    )
    return qdata, scale.squeeze(-1)


def copy_components(
    target: torch.Tensor,
    ranks: Sequence[int],
    source: torch.Tensor,
    source_ranks: Sequence[int],
    dim: int,
) -> None:
    """Copy one side of pairs into room for pairs of no smaller ranks.

    Args:
        target: with components of zeros, which change nothing.
        ranks: of modality 1, 2, ... that it has room for.
        source: one side of pairs.
        source_ranks: theirs.
        dim: along which components of all modalities lie, in both.
    """
    start = source_start = 0
    for rank, source_rank in zip(ranks, source_ranks):
        target.narrow(dim, start, source_rank).copy_(
            source.narrow(dim, source_start, source_rank)
        )
        start, source_start = start + rank, source_start + source_rank
