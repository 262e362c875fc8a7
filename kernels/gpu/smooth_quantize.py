# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::smooth_quantize`` in Triton: ``q = round(v / s)``, ``v = H (x * p_m - o_m)``.

A program quantizes ``BLOCK_M`` tokens. Each reads the ``p`` of its modality, four bytes
an element to two of bfloat16 ``x``; tokens beside each other are mostly of one
modality, so all but the first of a program find it in L1. A row that fits in
``BLOCK_K`` stays in registers between its maximum and the division by it; a longer one
is read twice, the second time from the cache.

A row is never shared between programs, not even where there is only one (decode): its
maximum would take a second launch, or programs that wait for each other, and either
costs more than it saves. A row of 8192 bfloat16 values with its ``p`` is 48 KiB; at
the 64 bytes a clock that one multiprocessor takes from L2 these are under 1000 clocks,
half a microsecond, less than a launch.

The integers are those of the reference bit by bit, for every operation is rounded as
there. A compiler may contract ``x * p - o`` into a single rounding, and a kernel that
``torch.compile`` builds has no switch against it. So the rounded product is multiplied
by ``one``, a number that the compiler does not know, and ``o`` is taken off in the same
instruction: a fused multiply-add of a rounded product can't be contracted further.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu import tuning
from torchao_masquant.kernels.gpu.launching import (
    TileConfig,
    launch,
    rows_contiguous,
    size_hint,
)
from torchao_masquant.kernels.gpu.rotation import (
    rotated,
    rotated_in_blocks_of,
    stages_of,
)

__all__ = [
    "CONFIGS",
    "SHARED",
    "SINGLE",
    "choose",
    "fitted",
    "largest_bits",
    "smooth_quantize",
    "smoothed_block",
]

# A token each, and no more of a block than a row needs: few tokens, or long rows.
SINGLE = (
    TileConfig.of(4, 1, BLOCK_M=1, BLOCK_K=1024),
    TileConfig.of(4, 1, BLOCK_M=1, BLOCK_K=2048),
    TileConfig.of(8, 1, BLOCK_M=1, BLOCK_K=4096),
    TileConfig.of(8, 1, BLOCK_M=1, BLOCK_K=8192),
    TileConfig.of(16, 1, BLOCK_M=1, BLOCK_K=16384),
)
# Tokens that share what they read of p.
SHARED = (
    TileConfig.of(8, 1, BLOCK_M=4, BLOCK_K=1024),
    TileConfig.of(8, 1, BLOCK_M=2, BLOCK_K=2048),
    TileConfig.of(16, 1, BLOCK_M=2, BLOCK_K=4096),
)
CONFIGS: tuple[TileConfig, ...] = SINGLE + SHARED


@triton.jit
def smoothed_block(
    x_rows: tl.tensor,
    pre_scale: tl.tensor,
    shift: tl.tensor,
    columns: tl.tensor,
    in_features: tl.tensor,
    one: tl.tensor,
    HAS_SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """A block of ``H (x * p - o)``, zeros past the end of a row.

    x_rows point to a row each, (BLOCK_M, 1); pre_scale and shift too, or to one for all.
    """
    inside = columns < in_features
    values = tl.load(x_rows + columns, mask=inside, other=0.0)
    p = tl.load(pre_scale + columns, mask=inside, other=0.0)
    smoothed = values.to(tl.float32) * p.to(tl.float32)
    if HAS_SHIFT:
        o = tl.load(shift + columns, mask=inside, other=0.0)
        smoothed = tl.fma(smoothed, one, -o.to(tl.float32))
    return rotated(smoothed, one, STAGES)


@triton.jit
def largest_bits(smoothed: tl.tensor) -> tl.tensor:
    """Of each row the largest magnitude, as the integer of the same bits.

    Magnitudes are ordered as these integers are, and nan comes after infinity: their
    maximum lets no nan get lost, as one of floats does.
    """
    return tl.max(smoothed.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _row_scale(bits: tl.tensor, known: tl.tensor, QUANT_MAX: tl.constexpr) -> tl.tensor:
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, float(QUANT_MAX))
    tiny = 1.1754943508222875e-38
    # A comparison with nan is false, so a nan stays.
    scale = tl.where(scale < tiny, tiny, scale)
    return tl.where(known, scale, float("nan"))


@triton.jit
def _store_levels(
    qdata: tl.tensor,
    smoothed: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stored: tl.tensor,
    in_features: tl.tensor,
) -> None:
    level = tl.div_rn(smoothed, scale[:, None])
    # Added to 1.5 * 2**23, a float of this size rounds to an integer, half to even,
    # which is in the lowest bits of the sum. No level is larger than the row's largest,
    # and that one rounds to QUANT_MAX, so there is nothing to clamp.
    bits = (level + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    bits = tl.where(level == level, bits, 0)
    tl.store(
        qdata + rows * in_features + columns,
        bits.to(tl.int8),
        mask=stored[:, None] & (columns < in_features),
    )


@triton.jit
def smooth_quantize_kernel(
    x: tl.tensor,
    pre_scale: tl.tensor,
    shift: tl.tensor,
    ids: tl.tensor,
    qdata: tl.tensor,
    scale: tl.tensor,
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
    QUANT_MAX: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_M tokens. ONE_BLOCK: a row fits in BLOCK_K. STAGES: see ``rotated``."""
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
    if ONE_BLOCK:
        smoothed = smoothed_block(
            x_rows, pre_scale, shift, inner, in_features, one, HAS_SHIFT, STAGES
        )
        row_scale = _row_scale(largest_bits(smoothed), known, QUANT_MAX)
        _store_levels(qdata, smoothed, row_scale, rows, inner, stored, in_features)
    else:
        largest = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for start in range(0, in_features, BLOCK_K):
            columns = start + inner
            smoothed = smoothed_block(
                x_rows, pre_scale, shift, columns, in_features, one, HAS_SHIFT, STAGES
            )
            largest = tl.maximum(largest, largest_bits(smoothed))
        row_scale = _row_scale(largest, known, QUANT_MAX)
        for start in range(0, in_features, BLOCK_K):
            columns = start + inner
            smoothed = smoothed_block(
                x_rows, pre_scale, shift, columns, in_features, one, HAS_SHIFT, STAGES
            )
            _store_levels(
                qdata, smoothed, row_scale, rows, columns, stored, in_features
            )
    tl.store(scale + row, row_scale, mask=stored)


def choose(
    tokens: int,
    in_features: int,
    device: torch.device,
    operator: str = "smooth_quantize",
) -> TileConfig:
    """The tiling for (T, K) tokens: a measured one, else by these sizes.

    Args:
        tokens: T, which may be symbolic.
        in_features: K.
        device: of the call.
        operator: whose table is looked into.
    """
    return tuning.choose(
        operator,
        tuning.tuning_key(tokens, in_features),
        CONFIGS,
        _fallback(size_hint(tokens), in_features),
        device,
    )


def _fallback(tokens: int, in_features: int) -> TileConfig:
    # With fewer tokens, programs of several would leave multiprocessors idle.
    configs = SHARED if tokens >= 1024 else SINGLE
    for config in configs + SINGLE:
        if in_features <= config["BLOCK_K"]:
            return config
    return SHARED[1] if tokens >= 1024 else SINGLE[3]


def fitted(config: TileConfig, one_block: bool, hadamard_size: int = 1) -> TileConfig:
    """A tiling that has registers for its loops, and holds blocks of the rotation."""
    # The two loops over a long row need registers of their own: half a block at a time.
    if not one_block:
        blocks = {**dict(config.blocks), "BLOCK_K": config["BLOCK_K"] // 2}
        if hadamard_size > 1:
            # So do the stages of a rotation.
            blocks["BLOCK_M"] = 1
        config = TileConfig.of(config.num_warps, config.num_stages, **blocks)
    name = "masquant::smooth_quantize"
    return rotated_in_blocks_of(name, config, SINGLE, hadamard_size)


def smooth_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
    config: Optional[TileConfig] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q = round(v / s)``, ``v = H (x * p_m - o_m)``, ``s = max |v| / (2 ** (bits - 1) - 1)``.

    Arguments and result are those of
    :func:`torchao_masquant.kernels.reference.smooth_quantize`, whose integers these are,
    but that a token whose id names no modality gets a scale of nan and integers of 0,
    where the reference raises: a kernel can't. Without a tiling ``config`` that of the
    tables is taken.

    Raises:
        ValueError: a block of the rotation does not fit in the registers of a program.
    """
    tokens, in_features = x.shape
    if config is None:
        config = choose(tokens, in_features, x.device)
    one_block = in_features <= config["BLOCK_K"]
    config = fitted(config, one_block, hadamard_size)
    x = rows_contiguous(x)
    pre_scale = rows_contiguous(act_pre_scale)
    # pre_scale stands for what there is not.
    ids = pre_scale if modality_ids is None else modality_ids
    shift = pre_scale if act_shift is None else rows_contiguous(act_shift)
    qdata = torch.empty((tokens, in_features), dtype=torch.int8, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    launch(
        smooth_quantize_kernel,
        (triton.cdiv(tokens, config["BLOCK_M"]),),
        x,
        pre_scale,
        shift,
        ids,
        qdata,
        scale,
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
        QUANT_MAX=2 ** (act_bits - 1) - 1,
        ONE_BLOCK=one_block,
        config=config,
    )
    return qdata, scale
