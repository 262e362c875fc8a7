# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::weight_only_linear`` in Triton: ``y = v (s_w (q_w - z))^T + v L1 L2 + b``.

``v = x p_m``, in 16 bits. A tile of weights is unpacked in registers and multiplied as
the integers ``q_w - z`` that it holds, which bfloat16 and float16 have exactly; the
scales multiply float32 sums, of a group of K or of all of it. So no weight is rounded,
and a result differs from the reference's by the rounding of ``v`` alone. The weights
are the left side of the product, ``q_w v^T``, for there Hopper takes registers.

The forms of launch are those of ``int_linear``: K is split for few tokens, and a fixed
number of programs walks over the tiles for many. Up to 16 tokens are smoothed where
they are read, since all that counts then is that each byte of the weights comes once;
more are smoothed by a kernel of their own, so that the product's loop only copies them,
and calls with a low-rank pair are, because ``low_rank_down`` reads ``v`` too.

float32 tokens are multiplied as three bfloat16 numbers that add up to them, for the
reason that ``low_rank_down`` gives. Smoothed float16 tokens are float16, and so have to stay below 65504.
"""

from typing import Optional, Sequence

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.int4_unpacking import load_half
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
)
from torchao_masquant.kernels.gpu.low_rank_down import low_rank_down
from torchao_masquant.kernels.gpu.smooth import smooth
from torchao_masquant.kernels.gpu.weight_only_tilings import (
    fallback,
    fitted,
    fitting,
    smoothed_here,
)

__all__ = ["weight_only_linear"]


@triton.jit
def weight_only_linear_kernel(
    x: tl.tensor,
    pre_scale: tl.tensor,
    weight: tl.tensor,
    workspace: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
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
    bias_rows: tl.tensor,
    stride_x: tl.tensor,
    stride_pre_scale: tl.tensor,
    stride_weight: tl.tensor,
    stride_scale: tl.tensor,
    stride_group: tl.tensor,
    stride_zero: tl.tensor,
    stride_zero_group: tl.tensor,
    stride_hidden: tl.tensor,
    stride_l2: tl.tensor,
    stride_modality_bias: tl.tensor,
    stride_ids: tl.tensor,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_MODALITY_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PARTS: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    L2_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """The product; of SPLIT_K > 1, the part that this program's second index names.

    What WIDTH and EVEN_K are is told in ``linear_tiles``. SMOOTH: x is not smoothed yet.
    """
    half: tl.constexpr = tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16
    # Triton's interpreter multiplies no bfloat16 matrices.
    operand: tl.constexpr = half if BF16_DOT else tl.float32
    # What stands for a weight of 0 once a block is unpacked: see load_half.
    plain: tl.constexpr = not PTX or WIDTH % 2 == 1
    magic: tl.constexpr = 1032 if half == tl.float16 else 136
    offset: tl.constexpr = (8 if plain else magic) if PACKED else 0
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
        columns = columns.to(tl.int64)
        x_rows = x + rows.to(tl.int64)[:, None] * stride_x
        weight_rows = weight + columns[:, None] * stride_weight
        if SMOOTH:
            if HAS_IDS:
                modality = tl.load(ids + rows.to(tl.int64) * stride_ids).to(tl.int64)
                known = ((modality >= 0) & (modality < modalities))[:, None]
                modality = tl.where(known, modality[:, None], 0)
                factors = pre_scale + modality * stride_pre_scale
            else:
                factors = pre_scale
        if HAS_ZERO_POINT:
            zeros = zero_point + columns * stride_zero
            if WIDTH == 0:
                zero = (tl.load(zeros).to(tl.float32) + offset).to(operand)
        y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for block in range(begin, end):
            group, k, left = block_of_k(block, in_features, WIDTH, BLOCK_K)
            # What lies past the group is zero in x, so in the weights it may be any
            # number.
            a = load_block(x_rows, k, left, inner, EVEN_K)
            if SMOOTH:
                p = load_block(factors, k, left, inner, EVEN_K)
                if HAS_IDS:
                    p = tl.where(known, p, float("nan"))
                a = a.to(tl.float32) * p
            if PACKED:
                b = load_half(
                    weight_rows,
                    k,
                    left,
                    inner,
                    inner_bytes,
                    half,
                    operand,
                    WIDTH,
                    EVEN_K,
                    PTX,
                    BLOCK_N,
                    BLOCK_K,
                )
            else:
                b = load_block(weight_rows, k, left, inner, EVEN_K)
                b = b.to(tl.float32).to(operand)
            if HAS_ZERO_POINT:
                if WIDTH:
                    zero = tl.load(zeros + group * stride_zero_group)
                    zero = (zero.to(tl.float32) + offset).to(operand)
                b -= zero[:, None]
            elif PACKED:
                b -= tl.full((1, 1), offset, operand)
            if WIDTH:
                part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            else:
                part = y
            for i in tl.static_range(X_PARTS):
                a_part = a.to(half)
                if i + 1 < X_PARTS:
                    a -= a_part.to(tl.float32)
                part = tl.dot(b, tl.trans(a_part.to(operand)), part)
            if WIDTH:
                group_scale = tl.load(
                    scale + columns * stride_scale + group * stride_group
                )
                y += part * group_scale[:, None]
            else:
                y = part
        if SPLIT_K > 1:
            store_share(
                workspace,
                y,
                split,
                tile_m,
                tile_n,
                tokens,
                out_features,
                True,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            epilogue(
                y,
                tile_m,
                tile_n,
                scale,
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
                bias_rows,
                0,
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
                True,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                HAS_X_SCALE=False,
            )


def _hidden(
    smoothed: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor],
) -> torch.Tensor:
    """(T, R) float32 ``v L1_m * s_r``."""
    if l1.dtype == torch.int8:
        # Exact; the kernel multiplies matrices of int8 with others of int8 only.
        l1 = l1.to(torch.float16 if smoothed.dtype == torch.float16 else torch.bfloat16)
    one = torch.ones((1, 1), device=smoothed.device).expand(smoothed.shape[0], 1)
    rest = (one, l1, modality_ids, ranks, low_rank_scale)
    if smoothed.dtype != torch.float32:
        return low_rank_down(smoothed, *rest)
    first = smoothed.bfloat16()
    second = (smoothed - first).bfloat16()
    third = (smoothed - first - second).bfloat16()
    hidden = low_rank_down(first, *rest)
    return hidden + (low_rank_down(second, *rest) + low_rank_down(third, *rest))


def weight_only_linear(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    """``y = v (s_w (q_w - z))^T + v L1_m * s_r L2_m + b_m + b``, ``v = H (x p_m)``.

    Arguments and result are those of
    :func:`torchao_masquant.kernels.reference.weight_only_linear`, but that ``v`` is
    rounded to x's type, and that a token whose id names no modality is nan, where the
    reference raises: a kernel can't. Without a tiling ``config`` that of the tables is
    taken.

    Raises:
        ValueError: ``ranks`` do not sum to R, or a block of the rotation does not fit in
            the registers of a program.
    """
    tokens, in_features = x.shape
    out_features, groups = scale.shape
    width = 0 if groups == 1 else in_features // groups
    if x.dtype == torch.float64:
        x = x.float()
    if config is None:
        config = choose(
            "weight_only_linear",
            (tokens, out_features, in_features),
            weight_bits,
            width > 0,
            fitting(x.dtype),
            fallback,
            x.device,
        )
    config = fitted(config, width, x.dtype == torch.float32)
    x, qdata = rows_contiguous(x), rows_contiguous(qdata)
    pre_scale = rows_contiguous(act_pre_scale)
    paired = l1 is not None and modality_ids is not None
    # The product reads a part of a token at a time, and a rotation whole blocks.
    smooth_in_product = smoothed_here(config, paired) and hadamard_size == 1
    if not smooth_in_product:
        x = smooth(x, pre_scale, modality_ids, hadamard_size)
    out = torch.empty((tokens, out_features), dtype=out_dtype, device=x.device)
    workspace = shares_of(out, config, torch.float32)
    hidden = None
    if paired:
        assert l1 is not None and modality_ids is not None
        hidden = _hidden(x, l1, modality_ids, ranks, low_rank_scale)
    added = additions(
        hidden,
        l2 if paired else None,
        modality_bias,
        modality_ids,
        bias,
        out_dtype,
        scale,
    )
    zeros = scale if zero_point is None else zero_point
    launch(
        weight_only_linear_kernel,
        grid(config, x.device),
        x,
        pre_scale,
        qdata,
        workspace,
        scale,
        zeros,
        *added.tensors,
        out,
        tokens,
        out_features,
        in_features,
        added.rank,
        pre_scale.shape[0],
        added.modalities,
        x.stride(0),
        pre_scale.stride(0),
        qdata.stride(0),
        scale.stride(0),
        scale.stride(1),
        zeros.stride(0),
        zeros.stride(1),
        *added.strides,
        SMOOTH=smooth_in_product,
        HAS_ZERO_POINT=zero_point is not None,
        X_PARTS=3 if x.dtype == torch.float32 else 1,
        config=config,
        **weight_flags(config, weight_bits, in_features, width, x.device),
        **added.flags,
    )
    if workspace is not out:
        add_shares(workspace, None, scale, width == 0, added, out)
    return out
