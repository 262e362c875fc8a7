# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::int_linear`` in Triton: ``y = s_x s_w (q_x q_w^T) + h L2 + b_m + b``.

One GEMM of int8 with everything else in its epilogue
(:mod:`torchao_masquant.kernels.gpu.linear_epilogue`).

Weights of one scale a channel are summed in int32, exactly, so that every tiling gives
the same sum; of one scale a group, each block of K is summed in int32 and added in
float32. Sums fit as long as ``K * 127 * 128 < 2**31``, that is K up to 132104.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.int4_unpacking import load_upper
from torchao_masquant.kernels.gpu.int_linear_tilings import (
    fallback,
    fitting,
    transposed,
)
from torchao_masquant.kernels.gpu.launching import (
    TileConfig,
    launch,
    rows_contiguous,
    shares_of,
)
from torchao_masquant.kernels.gpu.linear_epilogue import (
    add_shares,
    additions,
    epilogue,
    hidden_parts,
    l2_parts,
)
from torchao_masquant.kernels.gpu.linear_tiles import (
    block_of_k,
    choose,
    grid,
    load_block,
    share_of_k,
    store_share,
    tile,
    weight_flags,
    with_block_k,
)
from torchao_masquant.kernels.gpu.tuning import table_name

__all__ = ["int_linear"]

_MOST_FEATURES = (2**31 - 1) // (127 * 128)


@triton.jit
def int_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    workspace: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    l2: tl.tensor,
    modality_bias: tl.tensor,
    ids: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    rank: tl.tensor,
    modalities: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    stride_x_scale: tl.tensor,
    stride_scale: tl.tensor,
    stride_group: tl.tensor,
    stride_hidden: tl.tensor,
    stride_l2: tl.tensor,
    stride_modality_bias: tl.tensor,
    stride_ids: tl.tensor,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_MODALITY_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    L2_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    PTX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """The GEMM; of SPLIT_K > 1, the part that this program's second index names.

    What WIDTH and EVEN_K are is told in ``linear_tiles``.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    split = tl.program_id(1)
    begin, end = share_of_k(split, in_features, WIDTH, BLOCK_K, SPLIT_K)
    inner = tl.arange(0, BLOCK_K)
    inner_bytes = tl.arange(0, BLOCK_K // 2)

    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile(index, tiles_m, tiles_n, GROUP_M)
        # Rows past the end read the last one, and are not stored: no mask in the loop.
        rows = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tokens - 1)
        columns = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), out_features - 1)
        x_rows = x + rows.to(tl.int64)[:, None] * stride_x
        weight_rows = weight + columns.to(tl.int64)[:, None] * stride_weight
        shape: tl.constexpr = (BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N)
        if WIDTH:
            y = tl.zeros(shape, dtype=tl.float32)
        else:
            y = tl.zeros(shape, dtype=tl.int32)
        for block in range(begin, end):
            group, k, left = block_of_k(block, in_features, WIDTH, BLOCK_K)
            # What lies past the group is zero in x, so in the weights it may be anything.
            a = load_block(x_rows, k, left, inner, EVEN_K)
            if PACKED:
                b = load_upper(
                    weight_rows,
                    k,
                    left,
                    inner,
                    inner_bytes,
                    WIDTH,
                    EVEN_K,
                    PTX,
                    BLOCK_N,
                    BLOCK_K,
                )
            else:
                b = load_block(weight_rows, k, left, inner, EVEN_K)
            if WIDTH:
                if TRANSPOSED:
                    part = tl.dot(b, tl.trans(a), out_dtype=tl.int32)
                else:
                    part = tl.dot(a, tl.trans(b), out_dtype=tl.int32)
                group_scale = tl.load(
                    scale + columns.to(tl.int64) * stride_scale + group * stride_group
                )
                if PACKED:
                    group_scale *= 0.0625
                group_scale = tl.expand_dims(group_scale, 1 if TRANSPOSED else 0)
                y += part.to(tl.float32) * group_scale
            elif TRANSPOSED:
                y = tl.dot(b, tl.trans(a), y, out_dtype=tl.int32)
            else:
                y = tl.dot(a, tl.trans(b), y, out_dtype=tl.int32)
        if PACKED:
            if not WIDTH:
                y = y >> 4
        if SPLIT_K > 1:
            store_share(
                workspace,
                y,
                split,
                tile_m,
                tile_n,
                tokens,
                out_features,
                TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            epilogue(
                y,
                tile_m,
                tile_n,
                x_scale,
                scale,
                hidden,
                l2,
                modality_bias,
                ids,
                bias,
                out,
                tokens,
                out_features,
                rank,
                modalities,
                stride_x_scale,
                stride_scale,
                stride_hidden,
                stride_l2,
                stride_modality_bias,
                stride_ids,
                WIDTH == 0,
                HAS_LOW_RANK,
                HAS_MODALITY_BIAS,
                HAS_IDS,
                HAS_BIAS,
                HIDDEN_PARTS,
                L2_PARTS,
                BF16_DOT,
                TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )


def int_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    weight_bits: int,
    out_dtype: torch.dtype,
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    """``y = s_x s_w (q_x q_w^T) + h L2 + b_m + b``, with the tiling ``config``.

    Arguments and result are those of :func:`torchao_masquant.kernels.reference.int_linear`,
    but that rows of ``low_rank_hidden`` whose token is of the base are taken for zeros,
    as ``low_rank_down`` makes them. Without a tiling that of the tables is taken.

    Raises:
        ValueError: K is so large that a sum might not fit in int32.
    """
    tokens, in_features = qx.shape
    out_features, groups = scale.shape
    width = 0 if groups == 1 else in_features // groups
    if width == 0 and in_features > _MOST_FEATURES:
        raise ValueError(
            f"int_linear: {in_features} products of int8 may overflow int32; split K, "
            f"or give the weight scales of groups (at most {_MOST_FEATURES} features)."
        )
    if config is None:
        parts = hidden_parts(out_dtype) * l2_parts(l2)
        config = choose(
            "int_linear",
            (tokens, out_features, in_features),
            weight_bits,
            width > 0,
            fitting(width, parts, table_name(qx.device)),
            fallback,
            qx.device,
        )
    config = with_block_k(config, config["BLOCK_K"], width)
    qx = rows_contiguous(qx)
    qdata = rows_contiguous(qdata)
    out = torch.empty((tokens, out_features), dtype=out_dtype, device=qx.device)
    workspace = shares_of(out, config, torch.float32 if width else torch.int32)
    added = additions(
        low_rank_hidden, l2, modality_bias, modality_ids, bias, out_dtype, x_scale
    )
    launch(
        int_linear_kernel,
        grid(config, qx.device),
        qx,
        qdata,
        workspace,
        x_scale,
        scale,
        *added.tensors,
        out,
        tokens,
        out_features,
        in_features,
        added.rank,
        added.modalities,
        qx.stride(0),
        qdata.stride(0),
        x_scale.stride(0),
        scale.stride(0),
        scale.stride(1),
        *added.strides,
        TRANSPOSED=transposed(config, width),
        config=config,
        **weight_flags(config, weight_bits, in_features, width, qx.device),
        **added.flags,
    )
    if workspace is not out:
        add_shares(workspace, x_scale, scale, width == 0, added, out)
    return out
