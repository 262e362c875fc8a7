# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``smooth_quantize`` for compilation ahead of time."""

from typing import Any

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.rotation import stages_of
from torchao_masquant.kernels.gpu.smooth_quantize import (
    CONFIGS,
    SHARED,
    SINGLE,
    fitted,
    smooth_quantize_kernel,
)

__all__ = ["aot_cases"]


def aot_cases() -> list[AotCase]:
    """Every tiling, in one block and in several, with and without ids and shift.

    Of rotations, whose stages past the first few are alike, some.
    """
    return (
        [
            _aot_case(config, "bf16", has_ids, has_shift, one_block, 8)
            for config in CONFIGS
            for has_ids in (False, True)
            for has_shift in (False, True)
            for one_block in (True, False)
        ]
        + [
            _aot_case(config, dtype, True, True, True, act_bits)
            for config in (SINGLE[2], SHARED[1])
            for dtype in ("fp16", "fp32")
            for act_bits in (8, 4)
        ]
        + [
            _aot_case(config, "bf16", True, True, one_block, 8, hadamard_size)
            for config, hadamard_size in (
                (SINGLE[0], 64),
                (SINGLE[2], 128),
                (SINGLE[4], 2048),
                (SHARED[1], 128),
            )
            for one_block in (True, False)
        ]
    )


def _aot_case(
    config: TileConfig,
    dtype: str,
    has_ids: bool,
    has_shift: bool,
    one_block: bool,
    act_bits: int,
    hadamard_size: int = 1,
) -> AotCase:
    parts = [name for name, has in (("ids", has_ids), ("shift", has_shift)) if has]
    rotated_by = f" by {hadamard_size}" if hadamard_size > 1 else ""
    name = f"smooth_quantize{' rotated' if rotated_by else ''} a{act_bits} "
    name += f"{' '.join(parts) or 'bare'} {dtype} "
    name += f"{config['BLOCK_M']}x{config['BLOCK_K']}{rotated_by}"
    constexprs: dict[str, Any] = {
        "HAS_IDS": has_ids,
        "HAS_SHIFT": has_shift,
        "STAGES": stages_of(hadamard_size),
        "QUANT_MAX": 2 ** (act_bits - 1) - 1,
        "ONE_BLOCK": one_block,
    }
    tensors = {
        "x": f"*{dtype}",
        "pre_scale": "*fp32",
        "shift": "*fp32",
        "ids": "*i64" if has_ids else "*fp32",
        "qdata": "*i8",
        "scale": "*fp32",
    }
    sizes: tuple[str, ...] = ("tokens", "in_features", "modalities", "stride_x")
    sizes += ("stride_pre_scale", "stride_shift", "stride_ids")
    odd = ("tokens", "modalities", "stride_ids")
    return AotCase(
        name if one_block else f"{name} loop",
        smooth_quantize_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32"), "one": "fp32"},
        constexprs,
        fitted(config, one_block, hadamard_size),
        divisible=(*tensors, *(size for size in sizes if size not in odd)),
    )
