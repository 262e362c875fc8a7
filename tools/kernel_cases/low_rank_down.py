# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``low_rank_down`` for compilation ahead of time."""

from typing import Any

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.low_rank_down import (
    CONFIGS,
    REDUCE_BLOCKS,
    fitted,
    low_rank_down_kernel,
    reduce_kernel,
)

__all__ = ["aot_cases"]

# What both kernels take.
_TERMS = {"scale": "*fp32", "low_rank_scale": "*fp32", "ids": "*i64"}
_COLUMNS = ("last", "end_1", "end_2", "end_3")
_STRIDES = ("stride_scale", "stride_ids")
# Multiples of 16: sizes of real models, R where the ranks sum to one, and 0.
_DIVISIBLE = ("in_features", "stride_q", "rank", "stride_l1_k", "first", "last")


def aot_cases() -> list[AotCase]:
    """Every tiling with every type of L1, and the sums of split K."""
    cases = [
        _gemm_case(dtype, config)
        for dtype in ("bf16", "fp16", "fp32", "i8")
        for config in dict.fromkeys(fitted(c, dtype == "fp32") for c in CONFIGS)
    ]
    for sum_type in ("fp32", "i32"):
        for split_k in sorted({config["SPLIT_K"] for config in CONFIGS} - {1}):
            cases.append(_reduce_case(sum_type, split_k))
    return cases


def _case(
    name: str,
    kernel: Any,
    tensors: dict[str, str],
    sizes: tuple[str, ...],
    constexprs: dict[str, Any],
    config: TileConfig,
    int8_dot: bool,
) -> AotCase:
    # The strides of (T, 1) scales and (T,) ids, and the only launch of most calls.
    ones = dict.fromkeys((*_STRIDES, "modality"), 1)
    return AotCase(
        name,
        kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        {**constexprs, **ones},
        config,
        int8_dot,
        (*tensors, *(size for size in sizes if size in _DIVISIBLE)),
    )


def _gemm_case(dtype: str, config: TileConfig) -> AotCase:
    is_int8 = dtype == "i8"
    sum_type = "i32" if is_int8 and config["SPLIT_K"] > 1 else "fp32"
    name = f"low_rank_down {dtype} " + "x".join(
        str(config[f"BLOCK_{axis}"]) for axis in "MRK"
    )
    return _case(
        f"{name} split {config['SPLIT_K']}",
        low_rank_down_kernel,
        {"qdata": "*i8", "l1": f"*{dtype}", "out": f"*{sum_type}", **_TERMS},
        ("tokens", "rank", "in_features", "first", *_COLUMNS)
        + ("stride_q", "stride_l1_k"),
        {
            "stride_l1_r": 1,
            "HAS_LOW_RANK_SCALE": is_int8,
            "TRANSPOSED": is_int8,
            "L1_PARTS": 3 if dtype == "fp32" else 1,
            "BF16_DOT": True,
        },
        config,
        is_int8,
    )


def _reduce_case(sum_type: str, split_k: int) -> AotCase:
    return _case(
        f"low_rank_down reduce {sum_type} split {split_k}",
        reduce_kernel,
        {"workspace": f"*{sum_type}", "out": "*fp32", **_TERMS},
        ("tokens", "rank", "first", *_COLUMNS),
        {"HAS_LOW_RANK_SCALE": sum_type == "i32"},
        TileConfig.of(4, 1, SPLIT_K=split_k, **REDUCE_BLOCKS),
        False,
    )
