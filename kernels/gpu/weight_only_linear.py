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

float32 tokens are multiplied as three bfloat16 numbers that add up to them, as Triton
3.7 multiplies float32 matrices in TF32 on Blackwell, even where IEEE precision is asked
for. Smoothed float16 tokens are float16, and so have to stay below 65504.
"""

from typing import Any, Optional, Sequence

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.int_linear import (
    _REDUCE,
    _block_k,
    _epilogue,
    _programs,
    _rows_contiguous,
    _tile,
    reduce_kernel,
)
from torchao_masquant.kernels.gpu.launching import (
    AotCase,
    TileConfig,
    launch,
    size_hint,
)
from torchao_masquant.kernels.gpu.low_rank_down import low_rank_down
from torchao_masquant.kernels.gpu.tuning import choose as choose_tiling
from torchao_masquant.kernels.gpu.tuning import linear_name, tuning_key

__all__ = ["CONFIGS", "aot_cases", "choose", "weight_only_linear"]

# A byte below an exponent's is a number of 16 bits: 0x43nn is 128 + nn in bfloat16 and
# 0x64nn is 1024 + nn in float16. prmt puts two nibbles below two of them at once. The
# nibbles have their sign turned around before, so that they are q + 8.
UNPACK_BF16 = tl.constexpr(
    """{
    .reg .b32 low, high, shifted;
    and.b32 low, $4, 0x0F0F0F0F;
    xor.b32 low, low, 0x08080808;
    shr.b32 shifted, $4, 4;
    and.b32 high, shifted, 0x0F0F0F0F;
    xor.b32 high, high, 0x08080808;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 $2, high, 0x43434343, 0x4140;
    prmt.b32 $3, high, 0x43434343, 0x4342;
    }"""
)
UNPACK_FP16 = tl.constexpr(UNPACK_BF16.value.replace("0x43434343", "0x64646464"))


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
    HAS_IDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_K features of one token, times the factors of its modality."""
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
    tl.store(
        out + row * in_features + columns,
        smoothed.to(out.dtype.element_ty),
        mask=inside,
    )


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

    WIDTH is that of a group of K with one scale, or 0 for one scale a channel. EVEN_K:
    blocks of K cover groups, or all of K, with nothing over. SMOOTH: x is not smoothed
    yet.
    """
    half: tl.constexpr = tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16
    # Triton's interpreter multiplies no bfloat16 matrices.
    operand: tl.constexpr = half if BF16_DOT else tl.float32
    # What stands for a weight of 0 once a tile is unpacked.
    plain: tl.constexpr = not PTX or WIDTH % 2 == 1
    magic: tl.constexpr = 1032 if half == tl.float16 else 136
    offset: tl.constexpr = (8 if plain else magic) if PACKED else 0
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    split = tl.program_id(1)
    if WIDTH:
        blocks_per_group = (WIDTH + BLOCK_K - 1) // BLOCK_K
        blocks = (in_features // WIDTH) * blocks_per_group
    else:
        blocks = tl.cdiv(in_features, BLOCK_K)
    share = tl.cdiv(blocks, SPLIT_K)
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    inner = tl.arange(0, BLOCK_K)
    inner_bytes = tl.arange(0, BLOCK_K // 2)

    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP_M)
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
            if WIDTH:
                group = block // blocks_per_group
                start = (block % blocks_per_group) * BLOCK_K
                k = group * WIDTH + start
                left = WIDTH - start
            else:
                k = block * BLOCK_K
                left = in_features - k
            # What lies past the group is zero in x, so in the weights it may be any
            # number. EVEN_K has no mask, but a tile is loaded in one way only.
            if EVEN_K:
                a = tl.load(x_rows + (k + inner)[None, :])
            else:
                a = tl.load(
                    x_rows + (k + inner)[None, :],
                    mask=(inner < left)[None, :],
                    other=0.0,
                )
            if SMOOTH:
                if EVEN_K:
                    p = tl.load(factors + (k + inner)[None, :])
                else:
                    p = tl.load(
                        factors + (k + inner)[None, :],
                        mask=(inner < left)[None, :],
                        other=0.0,
                    )
                if HAS_IDS:
                    p = tl.where(known, p, float("nan"))
                a = a.to(tl.float32) * p
            if PACKED:
                if WIDTH % 2 == 0:
                    at = weight_rows + (k // 2 + inner_bytes)[None, :]
                    if EVEN_K:
                        pairs = tl.load(at)
                    else:
                        pairs = tl.load(
                            at, mask=(2 * inner_bytes < left)[None, :], other=0
                        )
                    if PTX and half == tl.float16:
                        low, high = tl.inline_asm_elementwise(
                            UNPACK_FP16,
                            "=r,=r,=r,=r,r",
                            [pairs],
                            dtype=(tl.float16, tl.float16),
                            is_pure=True,
                            pack=4,
                        )
                    elif PTX:
                        low, high = tl.inline_asm_elementwise(
                            UNPACK_BF16,
                            "=r,=r,=r,=r,r",
                            [pairs],
                            dtype=(tl.bfloat16, tl.bfloat16),
                            is_pure=True,
                            pack=4,
                        )
                    else:
                        low = ((pairs & 0xF) ^ 8).to(tl.float32).to(operand)
                        high = ((pairs >> 4) ^ 8).to(tl.float32).to(operand)
                    b = tl.join(low, high).reshape(BLOCK_N, BLOCK_K)
                else:
                    # A group of odd width may begin in the middle of a byte.
                    odd = (k + inner) & 1
                    pairs = tl.load(
                        weight_rows + ((k + inner) // 2)[None, :],
                        mask=(inner < left)[None, :],
                        other=0,
                    )
                    b = tl.where((odd == 1)[None, :], pairs >> 4, pairs & 0xF) ^ 8
                    b = b.to(tl.float32).to(operand)
            else:
                if EVEN_K:
                    b = tl.load(weight_rows + (k + inner)[None, :])
                else:
                    b = tl.load(
                        weight_rows + (k + inner)[None, :],
                        mask=(inner < left)[None, :],
                        other=0,
                    )
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
            row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
            column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
            tl.store(
                workspace + (split.to(tl.int64) * tokens + row) * out_features + column,
                y,
                mask=(row < tokens) & (column < out_features),
            )
        else:
            _epilogue(
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


def _config(
    num_warps: int, num_stages: int, m: int, n: int, k: int, split_k: int = 1
) -> TileConfig:
    return TileConfig.of(
        num_warps,
        num_stages,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        # The least that tensor cores take: the sums of a tile leave few registers.
        BLOCK_R=16,
        GROUP_M=8,
        SPLIT_K=split_k,
    )


_DECODE = (
    _config(8, 4, 16, 64, 128, 4),
    _config(8, 4, 16, 64, 128, 8),
    _config(4, 4, 16, 128, 64, 4),
    _config(8, 4, 16, 64, 128, 1),
)
_SHORT = (
    _config(4, 3, 32, 64, 128, 4),
    _config(4, 3, 64, 64, 64, 2),
)
_LONG = (
    _config(4, 3, 64, 128, 64),
    _config(8, 4, 128, 128, 32),
    # For float16 and float32, whose parts leave no registers for larger ones.
    _config(8, 3, 64, 128, 64),
    _config(8, 3, 64, 64, 64),
)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG

_SMOOTH = TileConfig.of(4, 1, BLOCK_K=1024)


def _configs(dtype: torch.dtype) -> tuple[TileConfig, ...]:
    """Of CONFIGS those that need no more registers than there are."""
    most = {torch.float32: 16, torch.float16: 32}.get(dtype, 64)
    return tuple(
        c for c in CONFIGS if c["BLOCK_M"] * c["BLOCK_N"] <= most * 32 * c.num_warps
    )


def choose(
    tokens: int,
    out_features: int,
    in_features: int,
    weight_bits: int,
    grouped: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> TileConfig:
    """The tiling for (T, K) tokens by (N, K) weights: a measured one, else by T.

    Args:
        tokens: T, which may be symbolic.
        out_features: N.
        in_features: K.
        weight_bits: up to 4 are packed, two to a byte.
        grouped: a channel has several scales.
        dtype: of the tokens.
        device: of the call.
    """
    configs = _configs(dtype)
    return choose_tiling(
        linear_name("weight_only_linear", weight_bits, grouped),
        tuning_key(tokens, out_features, in_features),
        configs,
        _fallback(size_hint(tokens), configs),
        device,
    )


def _fallback(tokens: int, configs: tuple[TileConfig, ...]) -> TileConfig:
    """By the number of tokens alone."""
    if tokens <= 16:
        return _DECODE[0]
    if tokens <= 64:
        return _SHORT[0]
    preferred = (*_SHORT[1:], *_LONG[2:]) if tokens <= 256 else _LONG[1:]
    return next(config for config in preferred if config in configs)


def _fitted(config: TileConfig, width: int, wide: bool) -> TileConfig:
    # Elements of four bytes, and their parts: half as many in a block fit.
    block_k = _block_k(config["BLOCK_K"] // 2 if wide else config["BLOCK_K"], width)
    blocks = {**dict(config.blocks), "BLOCK_K": block_k}
    return TileConfig.of(config.num_warps, config.num_stages, **blocks)


def _smoothed(
    x: torch.Tensor, act_pre_scale: torch.Tensor, modality_ids: Optional[torch.Tensor]
) -> torch.Tensor:
    """(T, K) of x's type."""
    tokens, in_features = x.shape
    out = torch.empty((tokens, in_features), dtype=x.dtype, device=x.device)
    ids = act_pre_scale if modality_ids is None else modality_ids
    launch(
        smooth_kernel,
        (tokens, triton.cdiv(in_features, _SMOOTH["BLOCK_K"])),
        x,
        act_pre_scale,
        ids,
        out,
        in_features,
        act_pre_scale.shape[0],
        x.stride(0),
        act_pre_scale.stride(0),
        ids.stride(0),
        HAS_IDS=modality_ids is not None,
        config=_SMOOTH,
    )
    return out


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
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    """``y = (x p_m) (s_w (q_w - z))^T + (x p_m) L1_m * s_r L2_m + b_m + b``.

    As :func:`torchao_masquant.kernels.reference.weight_only_linear`, but that ``x p_m``
    is rounded to x's type, and that a token whose id names no modality is nan, where
    the reference raises: a kernel can't.

    Args:
        x: (T, K) floating point.
        act_pre_scale: (M, K) float32, reciprocal smoothing factors ``p_m``, base
            modality first.
        qdata: (N, K) int8, or (N, ceil(K / 2)) uint8 where ``weight_bits`` is at most
            4.
        scale: (N, G) float32; each of the G scales serves K / G neighbours.
        zero_point: (N, G) int8, or None for zeros.
        l1: (K, R) floating point or int8, or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None: what each modality adds.
        modality_ids: (T,) integers or None: every token is base, and no low-rank work
            is done.
        bias: (N,) floating point or None.
        ranks: columns of ``l1`` that belong to modality 1, 2, ...; they sum to R.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.
        low_rank_scale: (R,) float32 ``s_r`` where the pair is int8; None for ones.
        config: the tiling; None for that of the tables.

    Returns:
        (T, N) ``out_dtype``.

    Raises:
        ValueError: ``ranks`` do not sum to R.
    """
    tokens, in_features = x.shape
    out_features, groups = scale.shape
    packed = weight_bits <= 4
    width = 0 if groups == 1 else in_features // groups
    if x.dtype == torch.float64:
        x = x.float()
    if config is None:
        config = choose(
            tokens,
            out_features,
            in_features,
            weight_bits,
            width > 0,
            x.dtype,
            x.device,
        )
    config = _fitted(config, width, x.dtype == torch.float32)
    block_k = config["BLOCK_K"]
    x, qdata = _rows_contiguous(x), _rows_contiguous(qdata)
    pre_scale = _rows_contiguous(act_pre_scale)
    paired = l1 is not None and modality_ids is not None
    smooth_here = config["BLOCK_M"] <= 16 and not paired
    if not smooth_here:
        x = _smoothed(x, pre_scale, modality_ids)
    out = torch.empty((tokens, out_features), dtype=out_dtype, device=x.device)
    split_k = config["SPLIT_K"]
    workspace = out
    if split_k > 1:
        workspace = torch.empty(
            (split_k, tokens, out_features), dtype=torch.float32, device=x.device
        )
    # scale stands for what there is not.
    hidden = up = table = added = ids = scale
    zeros = scale if zero_point is None else zero_point
    rank = bias_rows = 0
    if paired:
        assert l1 is not None and l2 is not None and modality_ids is not None
        hidden = _hidden(x, l1, modality_ids, ranks, low_rank_scale)
        up = _rows_contiguous(l2)
        rank = up.shape[0]
    if modality_bias is not None:
        table = _rows_contiguous(modality_bias)
        bias_rows = table.shape[0]
    if modality_ids is not None:
        ids = modality_ids
    if bias is not None:
        added = _rows_contiguous(bias)
    parts = {
        "HAS_LOW_RANK": rank > 0,
        "HAS_MODALITY_BIAS": modality_bias is not None,
        "HAS_IDS": modality_ids is not None,
        "HAS_BIAS": bias is not None,
        # As in int_linear: what the result can show.
        "HIDDEN_PARTS": {torch.bfloat16: 1, torch.float16: 2}.get(out_dtype, 3),
        "L2_PARTS": {torch.float16: 2, torch.float32: 3}.get(up.dtype, 1)
        if rank
        else 1,
        "BF16_DOT": x.device.type != "cpu",
    }
    terms = (hidden, up, table, ids, added, out)
    strides = (hidden.stride(0), up.stride(0), table.stride(0), ids.stride(0))
    programs = _programs(x.device, config.num_warps)
    launch(
        weight_only_linear_kernel,
        (triton.cdiv(programs, split_k), split_k),
        x,
        pre_scale,
        qdata,
        workspace,
        scale,
        zeros,
        *terms,
        tokens,
        out_features,
        in_features,
        rank,
        pre_scale.shape[0],
        bias_rows,
        x.stride(0),
        pre_scale.stride(0),
        qdata.stride(0),
        scale.stride(0),
        scale.stride(1),
        zeros.stride(0),
        zeros.stride(1),
        *strides,
        PACKED=packed,
        WIDTH=width,
        EVEN_K=(width or in_features) % block_k == 0,
        SMOOTH=smooth_here,
        HAS_ZERO_POINT=zero_point is not None,
        X_PARTS=3 if x.dtype == torch.float32 else 1,
        PTX=x.device.type == "cuda" and torch.version.hip is None,
        config=config,
        **parts,
    )
    if split_k > 1:
        launch(
            reduce_kernel,
            # Never none: an empty grid is no launch, and to look would be a guard.
            (
                tokens // _REDUCE["BLOCK_M"] + 1,
                triton.cdiv(out_features, _REDUCE["BLOCK_N"]),
            ),
            workspace,
            scale,
            scale,
            *terms,
            tokens,
            out_features,
            rank,
            bias_rows,
            0,
            scale.stride(0),
            *strides,
            PER_CHANNEL=width == 0,
            HAS_X_SCALE=False,
            SPLIT_K=split_k,
            config=_REDUCE,
            **parts,
        )
    return out


# Arguments of the product and their types where all parts are there, in bfloat16.
_TENSORS = {
    "x": "*bf16",
    "pre_scale": "*fp32",
    "weight": "*u8",
    "workspace": "*bf16",
    "scale": "*fp32",
    "zero_point": "*i8",
    "hidden": "*fp32",
    "l2": "*bf16",
    "modality_bias": "*fp32",
    "ids": "*i64",
    "bias": "*bf16",
    "out": "*bf16",
}
_SIZES = (
    *("tokens", "out_features", "in_features", "rank", "modalities", "bias_rows"),
    *("stride_x", "stride_pre_scale", "stride_weight", "stride_scale"),
    *("stride_group", "stride_zero", "stride_zero_group", "stride_hidden"),
    *("stride_l2", "stride_modality_bias", "stride_ids"),
)
_ODD = ("tokens", "modalities", "bias_rows", "stride_scale", "stride_zero")
# Of a type of x: that of the other 16-bit operands, and the parts it is multiplied in.
_TYPES = {
    "bf16": ("*bf16", 1, 1, 1),
    "fp16": ("*fp16", 1, 2, 2),
    "fp32": ("*fp32", 3, 3, 3),
}


def aot_cases(architecture: Optional[str] = None) -> list[AotCase]:
    """Every tiling for every kind of weight, and the types of x with a few.

    Args:
        architecture: what runs there, such as "sm_90" or "gfx942"; None for what
            compiles for all. They differ in how 4-bit weights are unpacked.
    """
    ptx = architecture is not None and architecture.startswith("sm_")
    cases = [
        _smooth_case(dtype, has_ids) for dtype in _TYPES for has_ids in (False, True)
    ]
    for packed in (True, False):
        for width in (0, 128):
            for config in CONFIGS:
                for full in (False, True):
                    cases.append(_case(config, "bf16", packed, width, full, ptx))
            for dtype, name in (("fp16", torch.float16), ("fp32", torch.float32)):
                configs = _configs(name)
                for tokens in (1, 4096):
                    config = _fallback(tokens, configs)
                    cases.append(_case(config, dtype, packed, width, True, ptx))
    return cases


def _case(
    config: TileConfig, dtype: str, packed: bool, width: int, full: bool, ptx: bool
) -> AotCase:
    config = _fitted(config, width, dtype == "fp32")
    name = f"weight_only_linear w{4 if packed else 8}"
    name += f"{f' group {width}' if width else ''} "
    name += "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
    name += f" split {config['SPLIT_K']} warps {config.num_warps}"
    operand, x_parts, hidden_parts, l2_parts = _TYPES[dtype]
    tensors = dict(_TENSORS)
    for tensor in ("x", "l2", "bias", "out"):
        tensors[tensor] = operand
    tensors["workspace"] = "*fp32" if config["SPLIT_K"] > 1 else operand
    if not packed:
        tensors["weight"] = "*i8"
    if not full:
        # scale stands for what there is not.
        for tensor in ("zero_point", "hidden", "l2", "modality_bias", "ids", "bias"):
            tensors[tensor] = "*fp32"
    ones = {"stride_ids": 1}
    if width:
        ones |= {"stride_group": 1, "stride_zero_group": 1}
    sizes = tuple(size for size in _SIZES if size not in ones)
    odd = _ODD if width else (*_ODD, "stride_group", "stride_zero_group")
    return AotCase(
        f"{name} {dtype} {'full' if full else 'bare'}",
        weight_only_linear_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        {
            "PACKED": packed,
            "WIDTH": width,
            "EVEN_K": True,
            "SMOOTH": config["BLOCK_M"] <= 16 and not full,
            "HAS_ZERO_POINT": full,
            "HAS_LOW_RANK": full,
            "HAS_MODALITY_BIAS": full,
            "HAS_IDS": full,
            "HAS_BIAS": full,
            "X_PARTS": x_parts,
            "HIDDEN_PARTS": hidden_parts,
            "L2_PARTS": l2_parts,
            "BF16_DOT": True,
            "PTX": ptx,
            **ones,
        },
        config,
        False,
        (*tensors, *(size for size in sizes if size not in odd)),
    )


def _smooth_case(dtype: str, has_ids: bool) -> AotCase:
    sizes = ("in_features", "modalities", "stride_x", "stride_pre_scale", "stride_ids")
    tensors = {
        "x": f"*{dtype}",
        "pre_scale": "*fp32",
        "ids": "*i64" if has_ids else "*fp32",
        "out": f"*{dtype}",
    }
    constexprs: dict[str, Any] = {"HAS_IDS": has_ids}
    return AotCase(
        f"weight_only_linear smooth {dtype}{' ids' if has_ids else ''}",
        smooth_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        constexprs,
        _SMOOTH,
        divisible=(*tensors, "in_features", "stride_x", "stride_pre_scale"),
    )
