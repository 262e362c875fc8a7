# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``H (x p_m)`` in Triton: tokens that are smoothed and stay in 16 bits, or in float32."""

from typing import Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.launching import TileConfig, launch
from torchao_masquant.kernels.gpu.rotation import (
    rotated,
    rotated_in_blocks_of,
    stages_of,
)

__all__ = ["SMOOTH", "WIDE", "smooth"]


@triton.jit
def smooth_kernel(
    x: tl.tensor,
    pre_scale: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    in_features: tl.tensor,
    modalities: tl.tensor,
    stride_x: tl.tensor,
    stride_pre_scale: tl.tensor,
    stride_ids: tl.tensor,
    one: tl.tensor,
    HAS_IDS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_K features of one token, times the factors of its modality, and rotated."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < in_features
    known = row >= 0
    if HAS_IDS:
        modality = tl.load(ids + row * stride_ids).to(tl.int64)
        # An id that names no modality reads nothing out of bounds, and shows as nan.
        known = (modality >= 0) & (modality < modalities)
        pre_scale += tl.where(known, modality, 0) * stride_pre_scale
    p = tl.load(pre_scale + columns, mask=inside, other=0.0)
    values = tl.load(x + row * stride_x + columns, mask=inside, other=0.0)
    smoothed = values.to(tl.float32) * tl.where(known, p, float("nan"))
    smoothed = rotated(smoothed, one, STAGES)
    tl.store(
        out + row * in_features + columns,
        smoothed.to(out.dtype.element_ty),
        mask=inside,
    )


SMOOTH = TileConfig.of(4, 1, BLOCK_K=1024)
# For rotations of larger blocks.
WIDE = tuple(TileConfig.of(w, 1, BLOCK_K=1024 * w) for w in (2, 4, 8, 16))


def smooth(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    hadamard_size: int = 1,
) -> torch.Tensor:
    """``H (x p_m)``.

    Args:
        x: (T, K) floating point, neighbours in a row side by side.
        act_pre_scale: (M, K) float32, reciprocal smoothing factors ``p_m``.
        modality_ids: (T,) integers or None: every token is base.
        hadamard_size: b of the rotation ``H``, which divides K; 1 for none.

    Returns:
        (T, K) of x's type; nan for a token whose id names no modality.

    Raises:
        ValueError: a block of the rotation does not fit in the registers of a program.
    """
    tokens, in_features = x.shape
    out = torch.empty((tokens, in_features), dtype=x.dtype, device=x.device)
    ids = act_pre_scale if modality_ids is None else modality_ids
    name = "masquant::weight_only_linear"
    config = rotated_in_blocks_of(name, SMOOTH, WIDE, hadamard_size)
    launch(
        smooth_kernel,
        (tokens, triton.cdiv(in_features, config["BLOCK_K"])),
        x,
        act_pre_scale,
        ids,
        out,
        in_features,
        act_pre_scale.shape[0],
        x.stride(0),
        act_pre_scale.stride(0),
        ids.stride(0),
        1.0,
        HAS_IDS=modality_ids is not None,
        STAGES=stages_of(hadamard_size),
        config=config,
    )
    return out
