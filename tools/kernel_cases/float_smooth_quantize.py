# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``float_smooth_quantize`` for compilation ahead of time."""

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.float_smooth_quantize import (
    float_smooth_quantize_kernel,
    format_flags,
)
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.rotation import stages_of
from torchao_masquant.kernels.gpu.smooth_quantize import SHARED, SINGLE, fitted
from torchao_masquant.kernels.number_formats import FORMATS, number_format

__all__ = ["aot_cases"]


def aot_cases() -> list[AotCase]:
    """Every format in a few tilings, in one block and in several; and types of tokens."""
    cases = []
    for act_format in FORMATS:
        form = number_format(act_format)
        of_token = form.two_levels or form.group_size is None
        for config, hadamard_size in (
            (SINGLE[0], 1),
            (SINGLE[4], 1),
            (SHARED[2], 1),
            (SHARED[1], 128),
        ):
            for one_block in (True, False) if of_token else (True,):
                cases.append(
                    _aot_case(act_format, config, "bf16", one_block, hadamard_size)
                )
        for dtype in ("fp16", "fp32"):
            cases.append(_aot_case(act_format, SHARED[1], dtype, True, 1))
    return cases


def _aot_case(
    act_format: str,
    config: TileConfig,
    dtype: str,
    one_block: bool,
    hadamard_size: int,
) -> AotCase:
    form = number_format(act_format)
    config = fitted(config, one_block, max(hadamard_size, form.group_size or 1))
    name = f"float_smooth_quantize {act_format} {dtype} "
    name += f"{config['BLOCK_M']}x{config['BLOCK_K']}"
    name += f" by {hadamard_size}" if hadamard_size > 1 else ""
    flags = format_flags(act_format)
    tensors = {
        "x": f"*{dtype}",
        "pre_scale": "*fp32",
        "shift": "*fp32",
        "ids": "*i64",
        "qdata": "*u8",
        "scale": "*u8" if flags["E8M0"] or flags["TWO_LEVELS"] else "*fp32",
        "token_scale": "*fp32",
    }
    sizes = ("tokens", "in_features", "modalities", "stride_x", "stride_pre_scale")
    sizes += ("stride_shift", "stride_ids")
    odd = ("tokens", "modalities", "stride_ids")
    return AotCase(
        name if one_block else f"{name} loop",
        float_smooth_quantize_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32"), "one": "fp32"},
        {
            "HAS_IDS": True,
            "HAS_SHIFT": True,
            "STAGES": stages_of(hadamard_size),
            "ONE_BLOCK": one_block,
            **flags,
        },
        config,
        divisible=(*tensors, *(size for size in sizes if size not in odd)),
    )
