# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::float_smooth_quantize`` in Triton: ``q = nearest((H (x * p_m - o_m)) / s)``.

What :mod:`~torchao_masquant.kernels.gpu.smooth_quantize` does, in its tilings, but for
what tokens are rounded to. Codes and scales are those of the reference bit by bit: every
operation is rounded as there, and codes are made of the bits of float32
(:mod:`~torchao_masquant.kernels.gpu.float_codes`), by no conversion of a GPU's.

Where the scale of a group depends on nothing outside of it, programs share a row; where a
token has a scale, none is shared, as with integers.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.float_codes import (
    decoded,
    encoded,
    mantissa_of,
    spread,
)
from torchao_masquant.kernels.gpu.launching import TileConfig, launch, rows_contiguous
from torchao_masquant.kernels.gpu.rotation import stages_of
from torchao_masquant.kernels.gpu.smooth_quantize import (
    choose,
    fitted,
    largest_bits,
    smoothed_block,
)
from torchao_masquant.kernels.number_formats import number_format

__all__ = ["float_smooth_quantize", "float_smooth_quantize_kernel", "format_flags"]

_NAN = tl.constexpr(0x7F)
# Bits of infinity; what is nan has more.
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _token_scale(
    bits: tl.tensor, REACH: tl.constexpr, TWO_LEVELS: tl.constexpr
) -> tl.tensor:
    """(BLOCK_M,) float32, of the bits of the largest magnitudes."""
    largest = bits.to(tl.float32, bitcast=True)
    if TWO_LEVELS:
        scale = tl.div_rn(largest, 256.0 * REACH)
        least = 1.2037062152420224e-35  # 2 ** -116
    else:
        scale = tl.div_rn(largest, float(REACH))
        least = 1.1754943508222875e-38  # 2 ** -126
    # A comparison with nan is false, so a nan stays.
    return tl.where(scale < least, least, scale)


@triton.jit
def _group_scale(
    bits: tl.tensor,
    token_scale: tl.tensor,
    known: tl.tensor,
    REACH: tl.constexpr,
    E8M0: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
) -> tuple:
    """(BLOCK_M, G) float32, nan where they serve what is not finite; and as they are held."""
    largest = bits.to(tl.float32, bitcast=True)
    finite = (bits < _INFINITE) & known[:, None]
    tiny = 1.1754943508222875e-38
    if TWO_LEVELS:
        scale = tl.div_rn(largest, token_scale[:, None] * REACH)
        scale = tl.where(scale < 0.001953125, 0.001953125, scale)
        finite = finite & (scale == scale)
        code = encoded(scale, 3)
        scale = decoded(code, 3)
        held = tl.where(finite, code, _NAN)
    elif E8M0:
        scale = tl.div_rn(largest, float(REACH))
        of_scale = tl.where(scale < tiny, tiny, scale).to(tl.int32, bitcast=True)
        code = (of_scale >> 23) + ((of_scale & 0x7FFFFF) > 0).to(tl.int32)
        code = tl.minimum(code, 254)
        scale = (code << 23).to(tl.float32, bitcast=True)
        held = tl.where(finite, code, 255)
    else:
        scale = tl.div_rn(largest, float(REACH))
        scale = tl.where(scale < tiny, tiny, scale)
        held = tl.where(finite, scale, float("nan"))
    return tl.where(finite, scale, float("nan")), held


@triton.jit
def _store_codes(
    qdata: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stored: tl.tensor,
    in_features: tl.tensor,
    MANTISSA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    codes = encoded(values, MANTISSA)
    held = in_features
    if MANTISSA == 1:
        pairs = tl.reshape(codes, (BLOCK_M, BLOCK_K // 2, 2))
        low, high = tl.split(pairs)
        codes = low | (high << 4)
        columns = columns // 2
        held = in_features // 2
    tl.store(
        qdata + rows * held + columns,
        codes.to(tl.uint8),
        mask=stored[:, None] & (columns < held),
    )


@triton.jit
def _store_block(
    qdata: tl.tensor,
    scale: tl.tensor,
    smoothed: tl.tensor,
    token_scale: tl.tensor,
    raw_scale: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    known: tl.tensor,
    stored: tl.tensor,
    in_features: tl.tensor,
    MANTISSA: tl.constexpr,
    REACH: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Codes of a block, and the scales of its groups."""
    if GROUP:
        groups = tl.reshape(smoothed, (BLOCK_M, BLOCK_K // GROUP, GROUP))
        bits = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        step, held = _group_scale(bits, raw_scale, known, REACH, E8M0, TWO_LEVELS)
        group = first // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        tl.store(
            scale + rows * (in_features // GROUP) + group,
            held.to(scale.dtype.element_ty),
            mask=stored[:, None] & (group < in_features // GROUP),
        )
        if TWO_LEVELS:
            step = step * token_scale[:, None]
        values = tl.div_rn(smoothed, spread(step, GROUP))
    else:
        values = tl.div_rn(smoothed, token_scale[:, None])
    pairs: tl.constexpr = 2 if MANTISSA == 1 else 1
    columns = first + pairs * tl.arange(0, BLOCK_K // pairs)[None, :]
    _store_codes(
        qdata,
        values,
        rows,
        columns,
        stored,
        in_features,
        MANTISSA,
        BLOCK_M,
        BLOCK_K,
    )


@triton.jit
def float_smooth_quantize_kernel(
    x: tl.tensor,
    pre_scale: tl.tensor,
    shift: tl.tensor,
    ids: tl.tensor,
    qdata: tl.tensor,
    scale: tl.tensor,
    token_scale: tl.tensor,
    tokens: tl.tensor,
    in_features: tl.tensor,
    modalities: tl.tensor,
    stride_x: tl.tensor,
    stride_pre_scale: tl.tensor,
    stride_shift: tl.tensor,
    stride_ids: tl.tensor,
    one: tl.tensor,
    HAS_IDS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
    MANTISSA: tl.constexpr,
    REACH: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    TWO_LEVELS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_M tokens, of which program_id(1) has a block where none has a scale.

    GROUP: neighbours that share a scale, 0 for all of a token. TWO_LEVELS: the token has
    one besides. ONE_BLOCK: what a program has of a row fits in BLOCK_K.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = row < tokens
    # Rows past the end are the last one again, and are not stored.
    row = tl.minimum(row, tokens - 1)
    rows = row[:, None]
    x_rows = x + rows * stride_x
    known = stored
    if HAS_IDS:
        modality = tl.load(ids + row * stride_ids).to(tl.int64)
        # An id that names no modality reads nothing out of bounds, and shows as nan.
        known = (modality >= 0) & (modality < modalities)
        modality = tl.where(known, modality, 0)[:, None]
        pre_scale += modality * stride_pre_scale
        shift += modality * stride_shift
    inner = tl.arange(0, BLOCK_K)[None, :]
    OF_TOKEN: tl.constexpr = TWO_LEVELS or GROUP == 0
    # No scale of a group depends on it where a token has none.
    raw_scale = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if ONE_BLOCK:
        first = tl.program_id(1) * BLOCK_K
        smoothed = smoothed_block(
            x_rows,
            pre_scale,
            shift,
            first + inner,
            in_features,
            one,
            HAS_SHIFT,
            STAGES,
        )
        largest = largest_bits(smoothed)
    else:
        largest = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for start in range(0, in_features, BLOCK_K):
            smoothed = smoothed_block(
                x_rows,
                pre_scale,
                shift,
                start + inner,
                in_features,
                one,
                HAS_SHIFT,
                STAGES,
            )
            largest = tl.maximum(largest, largest_bits(smoothed))
    if OF_TOKEN:
        raw_scale = _token_scale(largest, REACH, TWO_LEVELS)
        found = tl.where(known & (largest < _INFINITE), raw_scale, float("nan"))
        tl.store(token_scale + row, found, mask=stored)
    else:
        found = raw_scale
    if ONE_BLOCK:
        _store_block(
            qdata,
            scale,
            smoothed,
            found,
            raw_scale,
            rows,
            first,
            known,
            stored,
            in_features,
            MANTISSA,
            REACH,
            GROUP,
            E8M0,
            TWO_LEVELS,
            BLOCK_M,
            BLOCK_K,
        )
    else:
        for start in range(0, in_features, BLOCK_K):
            smoothed = smoothed_block(
                x_rows,
                pre_scale,
                shift,
                start + inner,
                in_features,
                one,
                HAS_SHIFT,
                STAGES,
            )
            _store_block(
                qdata,
                scale,
                smoothed,
                found,
                raw_scale,
                rows,
                start,
                known,
                stored,
                in_features,
                MANTISSA,
                REACH,
                GROUP,
                E8M0,
                TWO_LEVELS,
                BLOCK_M,
                BLOCK_K,
            )


def format_flags(act_format: str) -> dict[str, int]:
    """Constexprs of the kernel that say what a format is."""
    form = number_format(act_format)
    return {
        "MANTISSA": mantissa_of(act_format),
        "REACH": int(form.reach),
        "GROUP": form.group_size or 0,
        "E8M0": form.scale_dtype == torch.float8_e8m0fnu,
        "TWO_LEVELS": form.two_levels,
    }


def float_smooth_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_format: str,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
    config: Optional[TileConfig] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q = nearest(v / s)``, ``v = H (x * p_m - o_m)``, ``s`` by the format's rule.

    Arguments and results are those of
    :func:`torchao_masquant.kernels.float_reference.float_smooth_quantize`, bit by bit, but
    for codes of what is nan, which may be any, and that a token whose id names no modality
    gets scales of nan, where the reference raises. Without a tiling ``config`` that of the
    tables is taken.

    Raises:
        ValueError: a block of the rotation does not fit in the registers of a program.
    """
    form = number_format(act_format)
    tokens, in_features = x.shape
    if config is None:
        config = choose(tokens, in_features, x.device, "float_smooth_quantize")
    group = form.group_size or 1
    of_token = form.two_levels or form.group_size is None
    one_block = in_features <= config["BLOCK_K"] or not of_token
    config = fitted(config, one_block, max(hadamard_size, group))
    blocks = 1 if of_token else triton.cdiv(in_features, config["BLOCK_K"])
    x = rows_contiguous(x)
    pre_scale = rows_contiguous(act_pre_scale)
    # pre_scale stands for what there is not.
    ids = pre_scale if modality_ids is None else modality_ids
    shift = pre_scale if act_shift is None else rows_contiguous(act_shift)

    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((tokens, columns), dtype=dtype, device=x.device)

    qdata = empty(in_features // form.grid.per_byte, torch.uint8)
    of_tokens = empty(1, torch.float32) if of_token else pre_scale
    scale = pre_scale
    if form.group_size is not None:
        floats = form.scale_dtype == torch.float32
        scale = empty(in_features // group, torch.float32 if floats else torch.uint8)
    launch(
        float_smooth_quantize_kernel,
        (triton.cdiv(tokens, config["BLOCK_M"]), blocks),
        x,
        pre_scale,
        shift,
        ids,
        qdata,
        scale,
        of_tokens,
        tokens,
        in_features,
        pre_scale.shape[0],
        x.stride(0),
        pre_scale.stride(0),
        shift.stride(0),
        ids.stride(0),
        1.0,
        HAS_IDS=modality_ids is not None,
        HAS_SHIFT=act_shift is not None,
        STAGES=stages_of(hadamard_size),
        ONE_BLOCK=one_block,
        config=config,
        **format_flags(act_format),
    )
    if form.grid.dtype != torch.uint8:
        qdata = qdata.view(form.grid.dtype)
    if form.group_size is None:
        return qdata, of_tokens, empty(0, torch.float32)
    if form.scale_dtype != torch.float32:
        scale = scale.view(form.scale_dtype)
    return qdata, scale, of_tokens if form.two_levels else empty(0, torch.float32)
