# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ends a linear's product: from sums to ``s_x s_w y + h L2 + b_m + b``.

It runs in the product's kernel, or in one of its own (``reduce_kernel``) where K was
split: that adds the shares in the order of K first. Atomic additions of int32 would be
as exact, but need a workspace of zeros first and a second kernel all the same; and
groups of K have float32 sums, for which only a fixed order gives the same result every
time.

The low-rank part is work only for tiles that hold a token of another modality than the
base: modalities come in spans, so most tiles of text have none, and read nothing of L2.
bfloat16 tensor cores multiply ``h`` by L2, at half the rate of int8: with every token of
another modality and a rank of 5 %, each such product adds a tenth to the time of the
whole GEMM. So ``h`` is split into no more bfloat16 parts than the result can show: one
for bfloat16, whose rounding of ``h`` is as fine as the result's own, two for float16,
three for float32, without the loss of a plain TF32 product.
"""

from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.launching import (
    TileConfig,
    launch,
    rows_contiguous,
)

__all__ = [
    "REDUCE",
    "Additions",
    "add_shares",
    "additions",
    "epilogue",
    "hidden_parts",
    "l2_parts",
    "reduce_kernel",
]


@triton.jit
def epilogue(
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


REDUCE = TileConfig.of(4, 1, BLOCK_M=16, BLOCK_N=64, BLOCK_R=32)


def hidden_parts(out_dtype: torch.dtype) -> int:
    """How many bfloat16 numbers of ``h`` a result can show."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(out_dtype, 3)


def l2_parts(l2: Optional[torch.Tensor]) -> int:
    """How many bfloat16 numbers hold an element of L2."""
    if l2 is None:
        return 1
    return {torch.float16: 2, torch.float32: 3}.get(l2.dtype, 1)


class Additions(NamedTuple):
    """``h L2 + b_m + b`` as the kernels take it.

    Attributes:
        tensors: ``h``, L2, the bias of each modality, ids and bias.
        rank: columns of ``h``; 0 for no pair.
        modalities: rows of the modalities' biases; 0 for none.
        strides: of the rows of all tensors but the bias.
        flags: constexprs that say which of them there are.
    """

    tensors: tuple[torch.Tensor, ...]
    rank: int
    modalities: int
    strides: tuple[int, ...]
    flags: dict[str, Any]


def additions(
    hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    absent: torch.Tensor,
) -> Additions:
    """What a call adds to its product.

    Args:
        hidden: (T, R) float32 or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None.
        modality_ids: (T,) integers or None.
        bias: (N,) floating point or None.
        out_dtype: floating point type of the result.
        absent: a matrix that stands for each of them that is None.
    """
    h = up = table = added = ids = absent
    rank = modalities = 0
    if hidden is not None:
        assert l2 is not None
        h, up = rows_contiguous(hidden), rows_contiguous(l2)
        rank = up.shape[0]
    if modality_bias is not None:
        table = rows_contiguous(modality_bias)
        modalities = table.shape[0]
    if modality_ids is not None:
        ids = modality_ids
    if bias is not None:
        added = rows_contiguous(bias)
    flags = {
        "HAS_LOW_RANK": rank > 0,
        "HAS_MODALITY_BIAS": modality_bias is not None,
        "HAS_IDS": modality_ids is not None,
        "HAS_BIAS": bias is not None,
        "HIDDEN_PARTS": hidden_parts(out_dtype),
        "L2_PARTS": l2_parts(l2),
        # Triton's interpreter multiplies no bfloat16 matrices.
        "BF16_DOT": absent.device.type != "cpu",
    }
    strides = (h.stride(0), up.stride(0), table.stride(0), ids.stride(0))
    return Additions((h, up, table, ids, added), rank, modalities, strides, flags)


def add_shares(
    workspace: torch.Tensor,
    x_scale: Optional[torch.Tensor],
    scale: torch.Tensor,
    per_channel: bool,
    added: Additions,
    out: torch.Tensor,
) -> None:
    """Finish a product whose K was split.

    Args:
        workspace: (SPLIT_K, T, N) int32 or float32, the sums of each share.
        x_scale: (T, 1) float32 or None for ones.
        scale: (N, G) float32.
        per_channel: the scale is not in the sums yet.
        added: from :func:`additions`.
        out: (T, N), written.
    """
    split_k, tokens, out_features = workspace.shape
    launch(
        reduce_kernel,
        # Never none: an empty grid is no launch, and to look would be a guard.
        (
            tokens // REDUCE["BLOCK_M"] + 1,
            triton.cdiv(out_features, REDUCE["BLOCK_N"]),
        ),
        workspace,
        scale if x_scale is None else x_scale,
        scale,
        *added.tensors,
        out,
        tokens,
        out_features,
        added.rank,
        added.modalities,
        0 if x_scale is None else x_scale.stride(0),
        scale.stride(0),
        *added.strides,
        PER_CHANNEL=per_channel,
        HAS_X_SCALE=x_scale is not None,
        SPLIT_K=split_k,
        config=REDUCE,
        **added.flags,
    )
