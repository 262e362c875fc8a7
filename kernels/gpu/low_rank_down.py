# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::low_rank_down`` in Triton: ``h = (s * q) L1 * s_r``, by modality.

A program computes a tile of tokens by columns of L1. A column belongs to a modality,
and modalities come in spans, so most tiles hold either only tokens and columns that
belong together or none that do: the latter write zeros and read neither ``q`` nor L1. A
tile of base tokens is always one of these.

Both scales are constant along K and multiply the finished sums, so a broken token (a
scale of nan) stays in its row. What is summed are products of ``q`` and L1 themselves:

- L1 of int8: in int32, exactly, so that every tiling gives the same sum.
- bfloat16 and float16: ``q`` is exact in either, and so is each product in float32.
- float32: as three bfloat16 numbers that add up to it, for the same reason, on tensor
  cores. (Where IEEE precision is asked for, Triton 3.7 multiplies float32 matrices in
  TF32 on Blackwell all the same, and Triton 3.9 not on tensor cores.)

Tokens in number formats of floats (``masquant::float_low_rank_down``) become bfloat16 times
the 8 bits of their groups' scales, which it holds, and L1 one to three bfloat16 numbers.
float32 scales of groups multiply the sums of a block of K, which lies within one.

Why this is a launch of its own, and not further rows of the integer product or a part of
the quantize pass, ``benchmarks/gpu_bench/roofline.py`` says, in numbers.

With few tokens, K is split: each of SPLIT_K programs sums its share into a workspace
(SPLIT_K, T, R), and a second kernel adds the shares in the order of K. No result
depends on which program was first.
"""

from typing import Optional, Sequence

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu import tuning
from torchao_masquant.kernels.gpu.float_codes import (
    FLOAT32,
    NONE,
    Operand,
    as_bytes,
    decoded,
    load_scale,
    spread,
)
from torchao_masquant.kernels.gpu.int4_unpacking import load_nibbles
from torchao_masquant.kernels.gpu.launching import (
    TileConfig,
    launch,
    rows_contiguous,
    shares_of,
    size_hint,
)
from torchao_masquant.kernels.gpu.linear_tiles import load_block

__all__ = [
    "CONFIGS",
    "REDUCE_BLOCKS",
    "choose",
    "fitted",
    "float_low_rank_down",
    "low_rank_down",
    "token_flags",
]


def _config(
    num_warps: int, num_stages: int, m: int, r: int, k: int, split_k: int = 1
) -> TileConfig:
    return TileConfig.of(
        num_warps, num_stages, BLOCK_M=m, BLOCK_R=r, BLOCK_K=k, SPLIT_K=split_k
    )


# Transposed, as int8 is: Hopper and Blackwell multiply at least 64 rows.
_DECODE = (_config(4, 3, 16, 64, 128, 16),)
_SHORT = (
    _config(4, 3, 32, 64, 128, 8),
    _config(4, 3, 64, 64, 64, 4),
)
_LONG = (_config(8, 3, 128, 64, 64),)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG

# Modalities beside the base that one launch tells apart; with more, it launches again.
_MODALITIES = 4


@triton.jit
def _masks(
    ids: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    last: tl.tensor,
    end_1: tl.tensor,
    end_2: tl.tensor,
    end_3: tl.tensor,
    modality: tl.tensor,
    stride_ids: tl.tensor,
) -> tuple:
    """(BLOCK_M, BLOCK_R) what is stored, and what of it is of the token's modality.

    Columns before end_1 are those of ``modality``, before end_2 of the next, and so on.
    Addresses must not come from here: torch.compile would take ids for written to.
    """
    stored = (rows < tokens)[:, None] & (columns < last)[None, :]
    owner = modality + (columns >= end_1).to(tl.int32)
    owner += (columns >= end_2).to(tl.int32) + (columns >= end_3).to(tl.int32)
    own = tl.load(ids + rows * stride_ids, mask=rows < tokens, other=0).to(tl.int64)
    return stored, stored & (own[:, None] == owner[None, :])


@triton.jit
def _scaled(
    total: tl.tensor,
    own: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    low_rank_scale: tl.tensor,
    stride_scale: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_LOW_RANK_SCALE: tl.constexpr,
) -> tl.tensor:
    """What is stored of a tile of sums."""
    hidden = total.to(tl.float32)
    if HAS_SCALE:
        s = tl.load(scale + rows * stride_scale, mask=rows < tokens, other=0.0)
        hidden *= s[:, None]
    if HAS_LOW_RANK_SCALE:
        s_r = tl.load(low_rank_scale + columns, mask=columns < last, other=0.0)
        hidden *= s_r.to(tl.float32)[None, :]
    return tl.where(own, hidden, 0.0)


@triton.jit
def _float_tokens(
    q_rows: tl.tensor,
    group_rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_M, BLOCK_K) float32 from k on, zeros past what is left.

    They are times the scales of their groups but for those of float32.
    """
    inner = tl.arange(0, BLOCK_K)
    if MANTISSA == 1:
        halves = tl.arange(0, BLOCK_K // 2)
        codes = load_nibbles(q_rows, k, left, inner, halves, 0, False, BLOCK_M, BLOCK_K)
    else:
        codes = load_block(q_rows, k, left, inner, False)
    values = decoded(codes, MANTISSA)
    if SCALE > FLOAT32:
        scale = load_scale(group_rows, k, left, SCALE, GROUP, False, BLOCK_K)
        values = values * spread(scale, GROUP)
    return values


@triton.jit
def low_rank_down_kernel(
    qdata: tl.tensor,
    l1: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    low_rank_scale: tl.tensor,
    ids: tl.tensor,
    groups: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    in_features: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    end_1: tl.tensor,
    end_2: tl.tensor,
    end_3: tl.tensor,
    modality: tl.tensor,
    stride_q: tl.tensor,
    stride_l1_k: tl.tensor,
    stride_l1_r: tl.tensor,
    stride_scale: tl.tensor,
    stride_ids: tl.tensor,
    stride_groups: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_LOW_RANK_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    L1_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    FLOATS: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """Columns [first, last) of the result; of SPLIT_K > 1, of one share's sums.

    FLOATS: tokens are codes of what MANTISSA, SCALE and GROUP say, see ``float_codes``.
    """
    split = tl.program_id(2)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored, own = _masks(
        ids, rows, columns, tokens, last, end_1, end_2, end_3, modality, stride_ids
    )
    at = out + rows[:, None] * rank + columns[None, :]
    if tl.max(tl.max(own.to(tl.int32), axis=1), axis=0) > 0:
        share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLIT_K) * BLOCK_K
        begin = split * share
        end = tl.minimum(begin + share, in_features)
        inner = tl.arange(0, BLOCK_K)
        # Rows past the end read the last one, and are not stored.
        read = tl.minimum(rows, tokens - 1)[:, None]
        q_rows = qdata + read * stride_q
        group_rows = groups + read * stride_groups
        l1_columns = l1 + columns.to(tl.int64)[None, :] * stride_l1_r
        column_inside = (columns < last)[None, :]
        is_int8: tl.constexpr = l1.dtype.element_ty == tl.int8 and not FLOATS
        sum_type: tl.constexpr = tl.int32 if is_int8 else tl.float32
        if TRANSPOSED:
            total = tl.zeros((BLOCK_R, BLOCK_M), dtype=sum_type)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_R), dtype=sum_type)
        for k in range(begin, end, BLOCK_K):
            inside = k + inner < end
            if FLOATS:
                q = _float_tokens(
                    q_rows,
                    group_rows,
                    k,
                    end - k,
                    MANTISSA,
                    SCALE,
                    GROUP,
                    BLOCK_M,
                    BLOCK_K,
                )
            else:
                q = tl.load(
                    q_rows + (k + inner)[None, :], mask=inside[None, :], other=0
                )
            down = tl.load(
                l1_columns + (k + inner).to(tl.int64)[:, None] * stride_l1_k,
                mask=inside[:, None] & column_inside,
                other=0,
            )
            if FLOATS:
                down = down.to(tl.float32)
            for part in tl.static_range(L1_PARTS):
                if down.dtype == tl.float32:
                    right = down.to(tl.bfloat16)
                    down -= right.to(tl.float32)
                else:
                    right = down
                if right.dtype == tl.bfloat16 and not BF16_DOT:
                    right = right.to(tl.float32)
                left = q.to(right.dtype)
                if SCALE == FLOAT32:
                    s = tl.load(group_rows + k // GROUP)
                    total += tl.dot(left, right, out_dtype=tl.float32) * s
                elif TRANSPOSED:
                    total = tl.dot(
                        tl.trans(right), tl.trans(left), total, out_dtype=sum_type
                    )
                else:
                    total = tl.dot(left, right, total, out_dtype=sum_type)
        if TRANSPOSED:
            total = tl.trans(total)
        if SPLIT_K > 1:
            tl.store(at + split.to(tl.int64) * tokens * rank, total, mask=own)
        else:
            hidden = _scaled(
                total,
                own,
                rows,
                columns,
                tokens,
                last,
                scale,
                low_rank_scale,
                stride_scale,
                HAS_SCALE,
                HAS_LOW_RANK_SCALE,
            )
            tl.store(at, hidden, mask=stored)
    elif SPLIT_K == 1:
        tl.store(at, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), mask=stored)


@triton.jit
def reduce_kernel(
    workspace: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    low_rank_scale: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    end_1: tl.tensor,
    end_2: tl.tensor,
    end_3: tl.tensor,
    modality: tl.tensor,
    stride_scale: tl.tensor,
    stride_ids: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_LOW_RANK_SCALE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Adds the shares in the order of K; reads only what was written of them."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored, own = _masks(
        ids, rows, columns, tokens, last, end_1, end_2, end_3, modality, stride_ids
    )
    element = rows[:, None] * rank + columns[None, :]
    total = tl.load(workspace + element, mask=own, other=0)
    part = tokens.to(tl.int64) * rank
    for split in tl.static_range(1, SPLIT_K):
        total += tl.load(workspace + split * part + element, mask=own, other=0)
    hidden = _scaled(
        total,
        own,
        rows,
        columns,
        tokens,
        last,
        scale,
        low_rank_scale,
        stride_scale,
        HAS_SCALE,
        HAS_LOW_RANK_SCALE,
    )
    tl.store(out + element, hidden, mask=stored)


REDUCE_BLOCKS = {"BLOCK_M": 16, "BLOCK_R": 64}


def choose(
    tokens: int,
    rank: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    operator: str = "low_rank_down",
) -> TileConfig:
    """The tiling for (T, K) tokens by (K, R): a measured one, else by these sizes.

    Args:
        tokens: T, which may be symbolic.
        rank: R, columns of L1 of all modalities.
        in_features: K.
        dtype: of L1.
        device: of the call.
        operator: whose table is looked into, and the tokens' format.
    """
    name = {torch.int8: "int8", torch.float32: "fp32"}.get(dtype, "16 bits")
    return tuning.choose(
        f"{operator} {name}",
        tuning.tuning_key(tokens, rank, in_features),
        CONFIGS,
        _fallback(size_hint(tokens)),
        device,
    )


def _fallback(tokens: int) -> TileConfig:
    if tokens <= 16:
        return _DECODE[0]
    if tokens <= 256:
        return _SHORT[0]
    if tokens <= 2048:
        return _SHORT[1]
    return _LONG[0]


def fitted(config: TileConfig, wide: bool, floats: bool = False) -> TileConfig:
    """A tiling for L1 of float32, where ``wide``, and for tokens in floats."""
    if not wide and not floats:
        return config
    # Neither three parts of L1 nor tokens that are decoded leave registers for the sums of
    # the largest tile.
    blocks = dict(config.blocks)
    blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 64)
    if not wide:
        return TileConfig.of(config.num_warps, config.num_stages, **blocks)
    # Elements of four bytes: half as many in a block fit where two bytes do.
    blocks["BLOCK_K"] //= 2
    return TileConfig.of(4, config.num_stages, **blocks)


def low_rank_down(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    """``h = (s * q) L1 * s_r``, the columns of other modalities set to zero.

    Arguments and result are those of
    :func:`torchao_masquant.kernels.reference.low_rank_down`, but that ``qdata`` may also
    be of 16 bits, smoothed alone, where ``l1`` is no int8, and that the columns of an id
    that names no modality are zeros. Without a tiling ``config`` that of the tables is
    taken.

    Raises:
        ValueError: ``ranks`` do not sum to R.
    """
    if config is None:
        tokens, in_features = qdata.shape
        config = choose(tokens, l1.shape[1], in_features, l1.dtype, qdata.device)
    return _low_rank_down(
        rows_contiguous(qdata),
        scale,
        scale,
        None,
        l1,
        modality_ids,
        ranks,
        low_rank_scale,
        config,
    )


def float_low_rank_down(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    token_scale: Optional[torch.Tensor],
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    act_format: str,
    low_rank_scale: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    """``h = x L1 * s_r``, the columns of other modalities set to zero.

    Arguments and result are those of
    :func:`torchao_masquant.kernels.float_reference.float_low_rank_down`, but that the
    columns of an id that names no modality are zeros. Without a tiling ``config`` that of
    the tables is taken.

    Raises:
        ValueError: ``ranks`` do not sum to R.
    """
    in_features = l1.shape[0]
    tokens = Operand.of(act_format, 8, scale, in_features)
    if config is None:
        config = choose(
            qdata.shape[0],
            l1.shape[1],
            in_features,
            l1.dtype,
            qdata.device,
            f"float_low_rank_down {act_format}",
        )
    of_token = scale if tokens.scale == NONE.value else token_scale
    if tokens.scale != FLOAT32.value:
        scale = as_bytes(scale) if tokens.scale != NONE.value else scale
    return _low_rank_down(
        as_bytes(rows_contiguous(qdata)),
        of_token,
        rows_contiguous(scale),
        tokens,
        l1,
        modality_ids,
        ranks,
        low_rank_scale,
        config,
    )


def _low_rank_down(
    qdata: torch.Tensor,
    of_token: Optional[torch.Tensor],
    groups: torch.Tensor,
    floats: Optional[Operand],
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor],
    config: TileConfig,
) -> torch.Tensor:
    """(T, R) float32, of tokens that are numbers, or codes of ``floats``."""
    tokens, (in_features, rank) = qdata.shape[0], l1.shape
    if sum(ranks) != rank:
        raise ValueError(
            f"ranks {list(ranks)} sum to {sum(ranks)}, but l1 has {rank} columns: give "
            "the columns of every modality but the base."
        )
    hidden = torch.empty((tokens, rank), dtype=torch.float32, device=qdata.device)
    config = fitted(config, l1.dtype == torch.float32, floats is not None)
    split_k = config["SPLIT_K"]
    is_int8 = l1.dtype == torch.int8 and floats is None
    out = shares_of(hidden, config, torch.int32 if is_int8 else torch.float32)
    # groups stand for what there is not.
    scale = groups if of_token is None else of_token
    factors = groups if low_rank_scale is None else low_rank_scale.contiguous()
    terms = (scale, factors, modality_ids)
    flags = {
        "HAS_SCALE": of_token is not None,
        "HAS_LOW_RANK_SCALE": low_rank_scale is not None,
    }
    last = 0
    for skipped in range(0, len(ranks), _MODALITIES):
        first = last
        ends = []
        for width in ranks[skipped : skipped + _MODALITIES]:
            last += width
            ends.append(last)
        if first == last:
            continue
        # Of modalities that there are not, no column is past the end.
        columns = (first, last, *(ends + [last] * 3)[:3], skipped + 1)
        strides = (scale.stride(0), modality_ids.stride(0))
        launch(
            low_rank_down_kernel,
            (
                triton.cdiv(tokens, config["BLOCK_M"]),
                triton.cdiv(last - first, config["BLOCK_R"]),
                split_k,
            ),
            qdata,
            l1,
            out,
            *terms,
            groups,
            tokens,
            rank,
            in_features,
            *columns,
            qdata.stride(0),
            l1.stride(0),
            l1.stride(1),
            *strides,
            groups.stride(0),
            TRANSPOSED=is_int8,
            # Triton's interpreter multiplies no bfloat16 matrices.
            BF16_DOT=qdata.device.type != "cpu",
            config=config,
            **flags,
            **token_flags(floats, l1.dtype),
        )
        if split_k > 1:
            reduce = TileConfig.of(4, 1, SPLIT_K=split_k, **REDUCE_BLOCKS)
            launch(
                reduce_kernel,
                (
                    triton.cdiv(tokens, reduce["BLOCK_M"]),
                    triton.cdiv(last - first, reduce["BLOCK_R"]),
                ),
                out,
                hidden,
                *terms,
                tokens,
                rank,
                *columns,
                *strides,
                config=reduce,
                **flags,
            )
    return hidden


def token_flags(floats: Optional[Operand], l1: torch.dtype) -> dict[str, int]:
    """Constexprs that say what tokens are, and of how many parts L1 is.

    Args:
        floats: None for numbers.
        l1: its type.
    """
    if floats is None:
        parts = {torch.float32: 3}
        mantissa, scale, group = 0, NONE.value, 0
    else:
        parts = {torch.float32: 3, torch.float16: 2}
        mantissa, scale, group = floats
    return {
        "FLOATS": floats is not None,
        "MANTISSA": mantissa,
        "SCALE": scale,
        "GROUP": group,
        "L1_PARTS": parts.get(l1, 1),
    }
