# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::int_linear`` in Triton: ``y = s_x s_w (q_x q_w^T) + h L2 + b_m + b``.

One GEMM of int8 with everything else in its epilogue, in two forms of launch:

- One pass: a fixed number of programs walks over the tiles, in an order that keeps
  the rows and columns of neighbours in L2. For long prompts.
- Split K, for few tokens, whose tiles alone would leave most of a GPU idle: each of
  SPLIT_K programs sums its share of K into a workspace (SPLIT_K, T, N), and a second
  kernel adds the shares in the order of K and runs the epilogue. Atomic additions of
  int32 would be as exact, but need a workspace of zeros first and a second kernel all
  the same; and groups of K have float32 sums, for which only a fixed order gives the
  same result every time.

Weights of one scale a channel are summed in int32, exactly, so that every tiling gives
the same sum; of one scale a group, each block of K is summed in int32 and added in
float32. 4-bit weights lie two to a byte. Both are unpacked to the *upper* half of their
bytes, 16 times their value: a shift or a mask each, with no sign to extend. The sum is
16 times as large and is divided by 16 exactly. It holds as long as that of 8-bit
weights does: to ``K * 127 * 128 < 2**31``, that is K up to 132104.

The low-rank part is work only for tiles that hold a token of another modality than the
base: modalities come in spans, so most tiles of text have none, and read nothing of L2.
bfloat16 tensor cores multiply ``h`` by L2, at half the rate of int8: with every token of
another modality and a rank of 5 %, each such product adds a tenth to the time of the
whole GEMM. So ``h`` is split into no more bfloat16 parts than the result can show: one
for bfloat16, whose rounding of ``h`` is as fine as the result's own, two for float16,
three for float32, without the loss of a plain TF32 product.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.launching import (
    AotCase,
    TileConfig,
    launch,
    size_hint,
)
from torchao_masquant.kernels.gpu.tuning import (
    choose,
    linear_name,
    table_name,
    tuning_key,
)

__all__ = ["CONFIGS", "aot_cases", "int_linear"]

_MOST_FEATURES = (2**31 - 1) // (127 * 128)


@triton.jit
def _tile(
    index: tl.tensor,
    tiles_m: tl.tensor,
    tiles_n: tl.tensor,
    GROUP_M: tl.constexpr,
) -> tuple:
    """Row and column of a tile: GROUP_M rows of tiles side by side, down then right."""
    span = GROUP_M * tiles_n
    first = (index // span) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = index % span
    return first + within % height, within // height


@triton.jit
def _epilogue(
    y: tl.tensor,
    tile_m: tl.tensor,
    tile_n: tl.tensor,
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
    rank: tl.tensor,
    modalities: tl.tensor,
    stride_x_scale: tl.tensor,
    stride_scale: tl.tensor,
    stride_hidden: tl.tensor,
    stride_l2: tl.tensor,
    stride_modality_bias: tl.tensor,
    stride_ids: tl.tensor,
    PER_CHANNEL: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_MODALITY_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    L2_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_X_SCALE: tl.constexpr = True,
) -> None:
    """From a tile of sums, (BLOCK_M, BLOCK_N) or transposed, to the result."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # The sums stay as they lie; it is the vectors that turn.
    row = tl.expand_dims(rows, 0 if TRANSPOSED else 1)
    column = tl.expand_dims(columns, 1 if TRANSPOSED else 0)
    y = y.to(tl.float32)
    if PER_CHANNEL:
        y *= tl.load(
            scale + column.to(tl.int64) * stride_scale,
            mask=column < out_features,
            other=0.0,
        )
    if HAS_X_SCALE:
        y *= tl.load(
            x_scale + row.to(tl.int64) * stride_x_scale, mask=row < tokens, other=0.0
        )
    if HAS_LOW_RANK:
        member = rows < tokens
        if HAS_IDS:
            ids_here = tl.load(
                ids + rows.to(tl.int64) * stride_ids, mask=member, other=0
            )
            member = ids_here != 0
        if tl.max(member.to(tl.int32), axis=0) > 0:
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                h = tl.load(
                    hidden + rows.to(tl.int64)[:, None] * stride_hidden + r[None, :],
                    mask=member[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                # Columns of a modality that has no token in this tile are zeros.
                if tl.max(tl.max((h != 0.0).to(tl.int32), axis=1), axis=0) > 0:
                    up = tl.load(
                        l2 + r.to(tl.int64)[:, None] * stride_l2 + columns[None, :],
                        mask=(r < rank)[:, None] & (columns < out_features)[None, :],
                        other=0,
                    )
                    if L2_PARTS > 1:
                        up = up.to(tl.float32)
                    else:
                        # int8 too: bfloat16 holds all of it.
                        up = up.to(tl.float32).to(tl.bfloat16)
                    for i in tl.static_range(HIDDEN_PARTS):
                        h_part = h.to(tl.bfloat16)
                        h_rest = h - h_part.to(tl.float32)
                        up_rest = up
                        for j in tl.static_range(L2_PARTS):
                            if i + j < HIDDEN_PARTS:
                                up_part = up_rest.to(tl.bfloat16)
                                if L2_PARTS > 1:
                                    up_rest -= up_part.to(tl.float32)
                                if BF16_DOT:
                                    left = h_part
                                    right = up_part
                                else:
                                    left = h_part.to(tl.float32)
                                    right = up_part.to(tl.float32)
                                if TRANSPOSED:
                                    y = tl.dot(tl.trans(right), tl.trans(left), y)
                                else:
                                    y = tl.dot(left, right, y)
                        h = h_rest
    inside = (row < tokens) & (column < out_features)
    if HAS_MODALITY_BIAS:
        if HAS_IDS:
            modality = tl.load(
                ids + row.to(tl.int64) * stride_ids, mask=row < tokens, other=0
            ).to(tl.int32)
            # Row by row of the few there are: to gather a row for each token would take
            # as many registers as the tile itself.
            for m in range(modalities):
                shift = tl.load(
                    modality_bias + m * stride_modality_bias + column,
                    mask=column < out_features,
                    other=0.0,
                ).to(tl.float32)
                y = tl.where(modality == m, y + shift, y)
        else:
            y += tl.load(
                modality_bias + column, mask=column < out_features, other=0.0
            ).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < out_features, other=0.0).to(
            tl.float32
        )
    tl.store(
        out + row.to(tl.int64) * out_features + column,
        y.to(out.dtype.element_ty),
        mask=inside,
    )


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

    WIDTH is that of a group of K with one scale, or 0 for one scale a channel. EVEN_K:
    blocks of K cover groups, or all of K, with nothing over.
    """
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
        x_rows = x + rows.to(tl.int64)[:, None] * stride_x
        weight_rows = weight + columns.to(tl.int64)[:, None] * stride_weight
        shape: tl.constexpr = (BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N)
        if WIDTH:
            y = tl.zeros(shape, dtype=tl.float32)
        else:
            y = tl.zeros(shape, dtype=tl.int32)
        for block in range(begin, end):
            if WIDTH:
                group = block // blocks_per_group
                offset = (block % blocks_per_group) * BLOCK_K
                k = group * WIDTH + offset
                left = WIDTH - offset
            else:
                k = block * BLOCK_K
                left = in_features - k
            # What lies past the group is zero in x, so in the weights it may be anything.
            if EVEN_K:
                a = tl.load(x_rows + (k + inner)[None, :])
            else:
                a = tl.load(
                    x_rows + (k + inner)[None, :],
                    mask=(inner < left)[None, :],
                    other=0,
                )
            if PACKED:
                if WIDTH % 2 == 0:
                    at = weight_rows + (k // 2 + inner_bytes)[None, :]
                    if EVEN_K:
                        pairs = tl.load(at)
                    else:
                        pairs = tl.load(
                            at, mask=(2 * inner_bytes < left)[None, :], other=0
                        )
                    if PTX:
                        # Four bytes at once; one by one takes twice the instructions.
                        low, high = tl.inline_asm_elementwise(
                            """{
                            .reg .b32 shifted;
                            shl.b32 shifted, $2, 4;
                            and.b32 $0, shifted, 0xF0F0F0F0;
                            and.b32 $1, $2, 0xF0F0F0F0;
                            }""",
                            "=r,=r,r",
                            [pairs],
                            dtype=(tl.uint8, tl.uint8),
                            is_pure=True,
                            pack=4,
                        )
                    else:
                        low = pairs << 4
                        high = pairs & 0xF0
                    b = tl.join(low, high).reshape(BLOCK_N, BLOCK_K)
                else:
                    # A group of odd width may begin in the middle of a byte.
                    odd = (k + inner) & 1
                    pairs = tl.load(
                        weight_rows + ((k + inner) // 2)[None, :],
                        mask=(inner < left)[None, :],
                        other=0,
                    )
                    b = tl.where((odd == 1)[None, :], pairs & 0xF0, pairs << 4)
                b = b.to(tl.int8, bitcast=True)
            elif EVEN_K:
                b = tl.load(weight_rows + (k + inner)[None, :])
            else:
                b = tl.load(
                    weight_rows + (k + inner)[None, :],
                    mask=(inner < left)[None, :],
                    other=0,
                )
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
            row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            row = tl.expand_dims(row, 0 if TRANSPOSED else 1)
            column = tl.expand_dims(column, 1 if TRANSPOSED else 0)
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


@triton.jit
def reduce_kernel(
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
    rank: tl.tensor,
    modalities: tl.tensor,
    stride_x_scale: tl.tensor,
    stride_scale: tl.tensor,
    stride_hidden: tl.tensor,
    stride_l2: tl.tensor,
    stride_modality_bias: tl.tensor,
    stride_ids: tl.tensor,
    PER_CHANNEL: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_MODALITY_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    L2_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Adds the SPLIT_K parts of a result in the order of K, and finishes it."""
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < tokens) & (column < out_features)
    at = workspace + row.to(tl.int64) * out_features + column
    part_size = tl.cast(tokens, tl.int64) * out_features
    y = tl.load(at, mask=inside, other=0)
    for split in tl.static_range(1, SPLIT_K):
        y += tl.load(at + split * part_size, mask=inside, other=0)
    _epilogue(
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
        PER_CHANNEL,
        HAS_LOW_RANK,
        HAS_MODALITY_BIAS,
        HAS_IDS,
        HAS_BIAS,
        HIDDEN_PARTS,
        L2_PARTS,
        BF16_DOT,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        HAS_X_SCALE,
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


# All of them fit the shared memory of every target: 64 KiB on gfx942, 99 on sm_89.
_DECODE = (
    _config(4, 4, 16, 64, 256, 4),
    _config(4, 4, 16, 64, 256, 8),
    _config(4, 4, 16, 64, 128, 1),
    _config(4, 4, 16, 128, 128, 4),
)
_SHORT = (
    _config(4, 3, 64, 64, 128, 4),
    _config(4, 3, 32, 64, 128, 4),
    _config(4, 3, 64, 128, 128, 2),
    _config(4, 3, 64, 128, 128, 1),
)
# Triton 3.7 waits for each product of int8 on Hopper before it starts the next: two
# programs of four warps on a multiprocessor keep its tensor cores busier than one.
_LONG = (
    _config(4, 4, 128, 128, 64),
    _config(8, 3, 128, 128, 128),
    _config(8, 3, 128, 256, 64),
    _config(8, 3, 256, 128, 64),
)
# Where scales of groups and many parts leave no registers for a larger one.
_SMALL = (_config(4, 3, 64, 64, 128),)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG + _SMALL

_REDUCE = TileConfig.of(4, 1, BLOCK_M=16, BLOCK_N=64, BLOCK_R=32)


def _fallback(tokens: int, configs: tuple[TileConfig, ...]) -> TileConfig:
    """By the number of tokens alone."""
    if tokens <= 16:
        return _DECODE[0]
    if tokens <= 64:
        return _SHORT[0]
    if tokens <= 256:
        return _SHORT[3]
    return next(c for c in _LONG + _SMALL if c in configs)


def _block_k(block_k: int, width: int) -> int:
    """A block of K for groups of this width: no wider, and dividing it if one can."""
    if width == 0 or width % block_k == 0:
        return block_k
    divisor = width & -width
    # Tensor cores take at least 32 neighbours of int8.
    if divisor >= 32:
        return min(block_k, divisor)
    return min(block_k, max(32, triton.next_power_of_2(width)))


def _transposed(config: TileConfig, width: int) -> bool:
    """Whether a tile is computed as ``q_w q_x^T``.

    Hopper multiplies at least 64 rows; and a thread holds few rows and many columns of
    a tile, so that scales of groups take less registers as rows.
    """
    return config["BLOCK_M"] < 64 or width > 0


def _configs(
    width: int, parts: int, architecture: Optional[str]
) -> tuple[TileConfig, ...]:
    """Of CONFIGS those that need no more registers than there are.

    Args:
        width: of a group of K, or 0.
        parts: of ``h`` times those of L2.
        architecture: as :func:`tuning.table_name` has it, or None.
    """
    # These two keep operands of a product in shared memory, or have registers of their
    # own for its sums.
    roomy = architecture in ("sm_90", "gfx942")
    most = 128 if roomy and not width and parts <= 2 else 64
    known: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG
    if width and parts > 4:
        most, known = 32, known + _SMALL
    if width and architecture == "sm_100":
        # Its sums leave tensor memory for registers, and spilled some.
        known = tuple(c for c in known if c != _DECODE[2])
    return tuple(
        c for c in known if c["BLOCK_M"] * c["BLOCK_N"] <= most * 32 * c.num_warps
    )


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _programs(device: torch.device, num_warps: int) -> int:
    """As many as a device can hold at once, or more: no size of the call is in it."""
    # In Triton's interpreter, and where a graph is traced for a GPU that is not there.
    if device.type != "cuda" or not torch.cuda.is_available():
        return 3
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (16 // num_warps)


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
    """``y = s_x s_w (q_x q_w^T) + h L2 + b_m + b``.

    As :func:`torchao_masquant.kernels.reference.int_linear`, but that rows of
    ``low_rank_hidden`` whose token is of the base are taken for zeros, as
    ``low_rank_down`` makes them.

    Args:
        qx: (T, K) int8.
        x_scale: (T, 1) float32.
        qdata: (N, K) int8, or (N, ceil(K / 2)) uint8 where ``weight_bits`` is at most
            4.
        scale: (N, G) float32; each of the G scales serves K / G neighbours.
        low_rank_hidden: (T, R) float32 or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None: what each modality adds.
        modality_ids: (T,) integers or None: every token is base.
        bias: (N,) floating point or None.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.
        config: the tiling; None for that of the tables.

    Returns:
        (T, N) ``out_dtype``.

    Raises:
        ValueError: K is so large that a sum might not fit in int32.
    """
    tokens, in_features = qx.shape
    out_features, groups = scale.shape
    packed = weight_bits <= 4
    width = 0 if groups == 1 else in_features // groups
    if width == 0 and in_features > _MOST_FEATURES:
        raise ValueError(
            f"int_linear: {in_features} products of int8 may overflow int32; split K, "
            f"or give the weight scales of groups (at most {_MOST_FEATURES} features)."
        )
    hidden_parts = {torch.bfloat16: 1, torch.float16: 2}.get(out_dtype, 3)
    l2_parts = 1
    if l2 is not None:
        l2_parts = {torch.float16: 2, torch.float32: 3}.get(l2.dtype, 1)
    if config is None:
        configs = _configs(width, hidden_parts * l2_parts, table_name(qx.device))
        config = choose(
            linear_name("int_linear", weight_bits, width > 0),
            tuning_key(tokens, out_features, in_features),
            configs,
            _fallback(size_hint(tokens), configs),
            qx.device,
        )
    block_k = _block_k(config["BLOCK_K"], width)
    config = TileConfig.of(
        config.num_warps,
        config.num_stages,
        **{**dict(config.blocks), "BLOCK_K": block_k},
    )
    qx = _rows_contiguous(qx)
    qdata = _rows_contiguous(qdata)
    out = torch.empty((tokens, out_features), dtype=out_dtype, device=qx.device)
    split_k = config["SPLIT_K"]
    workspace = out
    if split_k > 1:
        workspace = torch.empty(
            (split_k, tokens, out_features),
            dtype=torch.float32 if width else torch.int32,
            device=qx.device,
        )
    # x_scale stands for what there is not.
    hidden = up = table = added = x_scale
    ids = x_scale if modality_ids is None else modality_ids
    rank = modalities = 0
    if low_rank_hidden is not None:
        assert l2 is not None
        hidden, up = _rows_contiguous(low_rank_hidden), _rows_contiguous(l2)
        rank = up.shape[0]
    if modality_bias is not None:
        table = _rows_contiguous(modality_bias)
        modalities = table.shape[0]
    if bias is not None:
        added = _rows_contiguous(bias)
    parts = {
        "HAS_LOW_RANK": rank > 0,
        "HAS_MODALITY_BIAS": modality_bias is not None,
        "HAS_IDS": modality_ids is not None,
        "HAS_BIAS": bias is not None,
        "HIDDEN_PARTS": hidden_parts,
        "L2_PARTS": l2_parts,
        # Triton's interpreter multiplies no bfloat16 matrices.
        "BF16_DOT": qx.device.type != "cpu",
    }
    terms = (x_scale, scale, hidden, up, table, ids, added, out)
    strides = (hidden.stride(0), up.stride(0), table.stride(0), ids.stride(0))
    programs = _programs(qx.device, config.num_warps)
    launch(
        int_linear_kernel,
        (triton.cdiv(programs, split_k), split_k),
        qx,
        qdata,
        workspace,
        *terms,
        tokens,
        out_features,
        in_features,
        rank,
        modalities,
        qx.stride(0),
        qdata.stride(0),
        x_scale.stride(0),
        scale.stride(0),
        scale.stride(1),
        *strides,
        PACKED=packed,
        WIDTH=width,
        EVEN_K=(width or in_features) % block_k == 0,
        TRANSPOSED=_transposed(config, width),
        PTX=qx.device.type == "cuda" and torch.version.hip is None,
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
            *terms,
            tokens,
            out_features,
            rank,
            modalities,
            x_scale.stride(0),
            scale.stride(0),
            *strides,
            PER_CHANNEL=width == 0,
            HAS_X_SCALE=True,
            SPLIT_K=split_k,
            config=_REDUCE,
            **parts,
        )
    return out


# What both kernels take, in order, and of which type where all parts are there.
_TERMS = {
    "x_scale": "*fp32",
    "scale": "*fp32",
    "hidden": "*fp32",
    "l2": "*bf16",
    "modality_bias": "*fp32",
    "ids": "*i64",
    "bias": "*bf16",
    "out": "*bf16",
}
_FULL: dict[str, Any] = {
    "HAS_LOW_RANK": True,
    "HAS_MODALITY_BIAS": True,
    "HAS_IDS": True,
    "HAS_BIAS": True,
    "HIDDEN_PARTS": 1,
    "L2_PARTS": 1,
    "BF16_DOT": True,
}
_BARE = {**_FULL, **dict.fromkeys([n for n in _FULL if n.startswith("HAS")], False)}
# Name to the types and the constexprs that are not as in a full call in bfloat16.
_VARIANTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "bare": (dict.fromkeys(("hidden", "l2", "ids", "bias"), "*fp32"), _BARE),
    "one token": ({}, {"tokens": 1}),
    "uneven K": ({}, {"EVEN_K": False}),
    "int8 L2, base only": ({"l2": "*i8"}, {"HAS_IDS": False}),
    "float32": (
        {"l2": "*fp32", "bias": "*fp32", "ids": "*i32", "out": "*fp32"},
        {"HIDDEN_PARTS": 3, "L2_PARTS": 3},
    ),
    "float16": (
        {"l2": "*fp16", "bias": "*fp16", "ids": "*u8", "out": "*fp16"},
        {"HIDDEN_PARTS": 2, "L2_PARTS": 2},
    ),
}


def aot_cases(architecture: Optional[str] = None) -> list[AotCase]:
    """Every tiling for every kind of weight, and the variants of a call with a few.

    Args:
        architecture: what runs there, such as "sm_90" or "gfx942"; None for what
            compiles for all. They differ in how 4-bit weights are unpacked, and in how
            large a tile fits the registers.
    """
    ptx = architecture is not None and architecture.startswith("sm_")
    cases = []
    for packed in (False, True):
        for width in (0, 128):
            for config in _configs(width, 1, architecture):
                cases.append(_gemm_case(packed, width, ptx, config, "full"))
            for variant in _VARIANTS:
                values = {**_FULL, **_VARIANTS[variant][1]}
                parts = values["HIDDEN_PARTS"] * values["L2_PARTS"]
                configs = _configs(width, parts, architecture)
                for tokens in (1, 4096):
                    config = _fallback(tokens, configs)
                    cases.append(_gemm_case(packed, width, ptx, config, variant))
                # The one tiling for few tokens whose epilogue is its own.
                if _DECODE[2] in configs:
                    cases.append(_gemm_case(packed, width, ptx, _DECODE[2], variant))
    for width in (0, 128):
        for variant in ("full", *_VARIANTS):
            if variant != "uneven K":
                cases.append(_reduce_case(width, 4, variant))
    return cases


def _case(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    config: TileConfig,
    variant: str,
    int8_dot: bool,
) -> AotCase:
    types, values = _VARIANTS.get(variant, ({}, {}))
    # Triton compiles arguments that are 1, as strides of vectors are, for that value.
    per_group = "stride_group" in signature and constexprs["WIDTH"]
    ones = {"stride_x_scale", "stride_ids"} | ({"stride_group"} if per_group else set())
    constexprs = {**constexprs, **dict.fromkeys(ones, 1)}
    constexprs |= {n: v for n, v in values.items() if n in {*signature, *constexprs}}
    signature = {
        n: types.get(n, t) for n, t in signature.items() if n not in constexprs
    }
    odd = ("tokens", "modalities", "stride_scale", "stride_group")
    return AotCase(
        f"{name} {variant}",
        kernel,
        signature,
        constexprs,
        config,
        int8_dot,
        tuple(n for n in signature if n not in odd),
    )


def _gemm_case(
    packed: bool, width: int, ptx: bool, config: TileConfig, variant: str
) -> AotCase:
    blocks = {**dict(config.blocks), "BLOCK_K": _block_k(config["BLOCK_K"], width)}
    name = f"int_linear w{4 if packed else 8}{f' group {width}' if width else ''} "
    name += "x".join(str(blocks[f"BLOCK_{axis}"]) for axis in "MNK")
    workspace = "*bf16"
    if config["SPLIT_K"] > 1:
        workspace = "*fp32" if width else "*i32"
    integers = (
        *("tokens", "out_features", "in_features", "rank", "modalities"),
        *("stride_x", "stride_weight", "stride_x_scale", "stride_scale"),
        *("stride_group", "stride_hidden", "stride_l2", "stride_modality_bias"),
        "stride_ids",
    )
    return _case(
        f"{name} split {config['SPLIT_K']}",
        int_linear_kernel,
        {
            "x": "*i8",
            "weight": "*u8" if packed else "*i8",
            "workspace": workspace,
            **_TERMS,
            **dict.fromkeys(integers, "i32"),
        },
        {
            "PACKED": packed,
            "WIDTH": width,
            "EVEN_K": True,
            "TRANSPOSED": _transposed(config, width),
            "PTX": ptx,
            **_FULL,
        },
        TileConfig.of(config.num_warps, config.num_stages, **blocks),
        variant,
        True,
    )


def _reduce_case(width: int, split_k: int, variant: str) -> AotCase:
    integers = (
        *("tokens", "out_features", "rank", "modalities", "stride_x_scale"),
        *("stride_scale", "stride_hidden", "stride_l2", "stride_modality_bias"),
        "stride_ids",
    )
    return _case(
        f"int_linear reduce {'float32' if width else 'int32'} split {split_k}",
        reduce_kernel,
        {
            "workspace": "*fp32" if width else "*i32",
            **_TERMS,
            **dict.fromkeys(integers, "i32"),
        },
        {
            "PER_CHANNEL": width == 0,
            "HAS_X_SCALE": True,
            "SPLIT_K": split_k,
            **_FULL,
        },
        _REDUCE,
        variant,
        False,
    )
