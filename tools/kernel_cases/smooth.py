# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``smooth`` for compilation ahead of time."""

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.rotation import stages_of
from torchao_masquant.kernels.gpu.smooth import SMOOTH, WIDE, smooth_kernel

__all__ = ["aot_cases"]


def aot_cases() -> list[AotCase]:
    """Every type of token, with ids and without; two rotations."""
    return [
        _case(dtype, has_ids, 1, SMOOTH)
        for dtype in ("bf16", "fp16", "fp32")
        for has_ids in (False, True)
    ] + [
        _case("bf16", True, 128, SMOOTH),
        _case("bf16", True, 4096, WIDE[1]),
    ]


def _case(dtype: str, has_ids: bool, hadamard_size: int, config: TileConfig) -> AotCase:
    sizes = ("in_features", "modalities", "stride_x", "stride_pre_scale", "stride_ids")
    tensors = {
        "x": f"*{dtype}",
        "pre_scale": "*fp32",
        "ids": "*i64" if has_ids else "*fp32",
        "out": f"*{dtype}",
    }
    name = f"{dtype}{' ids' if has_ids else ''}"
    if hadamard_size > 1:
        name = f"rotated {name} {config['BLOCK_K']} by {hadamard_size}"
    return AotCase(
        f"weight_only_linear smooth {name}",
        smooth_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32"), "one": "fp32"},
        {"HAS_IDS": has_ids, "STAGES": stages_of(hadamard_size)},
        config,
        divisible=(*tensors, "in_features", "stride_x", "stride_pre_scale"),
    )
