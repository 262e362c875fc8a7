# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``low_rank_down`` for compilation ahead of time."""

from typing import Any, Optional

import torch

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.float_codes import Operand
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.low_rank_down import (
    CONFIGS,
    REDUCE_BLOCKS,
    fitted,
    low_rank_down_kernel,
    reduce_kernel,
    token_flags,
)

__all__ = ["aot_cases"]

# What both kernels take.
_TERMS = {"scale": "*fp32", "low_rank_scale": "*fp32", "ids": "*i64"}
_COLUMNS = ("last", "end_1", "end_2", "end_3")
_STRIDES = ("stride_scale", "stride_ids")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPES["i8"] = torch.int8
# Formats of tokens, and what scales of their groups are made of.
_FLOATS = {
    "e4m3": (torch.float32, 1),
    "e4m3-128": (torch.float32, 28),
    "nvfp4": (torch.float8_e4m3fn, 224),
    "mxfp4": (torch.float8_e8m0fnu, 112),
    "mxfp8": (torch.float8_e8m0fnu, 112),
}
_FEATURES = 3584
# Multiples of 16: sizes of real models, R where the ranks sum to one, and 0.
_DIVISIBLE = ("in_features", "stride_q", "rank", "stride_l1_k", "first", "last")


def aot_cases() -> list[AotCase]:
    """Every tiling with every type of L1, and the sums of split K."""
    cases = [
        _gemm_case(dtype, config)
        for dtype in ("bf16", "fp16", "fp32", "i8")
        for config in dict.fromkeys(fitted(c, dtype == "fp32") for c in CONFIGS)
    ]
    for act_format in _FLOATS:
        for config in (CONFIGS[0], fitted(CONFIGS[-1], False, True)):
            cases.append(_gemm_case("bf16", config, act_format))
    for dtype in ("fp16", "fp32", "i8"):
        cases.append(
            _gemm_case(dtype, fitted(CONFIGS[-1], dtype == "fp32", True), "nvfp4")
        )
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
    multiplies: str,
) -> AotCase:
    # The strides of (T, 1) scales and (T,) ids, and the only launch of most calls.
    ones = dict.fromkeys((*_STRIDES, "modality"), 1)
    return AotCase(
        name,
        kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        {**constexprs, **ones},
        config,
        multiplies,
        (*tensors, *(size for size in sizes if size in _DIVISIBLE)),
    )


def _gemm_case(
    dtype: str, config: TileConfig, act_format: Optional[str] = None
) -> AotCase:
    is_int8 = dtype == "i8" and act_format is None
    sum_type = "i32" if is_int8 and config["SPLIT_K"] > 1 else "fp32"
    name = "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MRK")
    floats, tokens, groups = None, "*i8", "*fp32"
    if act_format is None:
        name = f"low_rank_down {dtype} {name}"
    else:
        name = f"float_low_rank_down {act_format} {dtype} {name}"
        kind, count = _FLOATS[act_format]
        scale = torch.empty((1, count), dtype=kind, device="meta")
        floats = Operand.of(act_format, 8, scale, _FEATURES)
        tokens, groups = "*u8", "*fp32" if kind == torch.float32 else "*u8"
    return _case(
        f"{name} split {config['SPLIT_K']}",
        low_rank_down_kernel,
        {
            "qdata": tokens,
            "l1": f"*{dtype}",
            "out": f"*{sum_type}",
            **_TERMS,
            "groups": groups,
        },
        ("tokens", "rank", "in_features", "first", *_COLUMNS)
        + ("stride_q", "stride_l1_k", "stride_groups"),
        {
            "stride_l1_r": 1,
            "HAS_SCALE": True,
            "HAS_LOW_RANK_SCALE": dtype == "i8",
            "TRANSPOSED": is_int8,
            "BF16_DOT": True,
            **token_flags(floats, _DTYPES[dtype]),
        },
        config,
        "int8" if is_int8 else "",
    )


def _reduce_case(sum_type: str, split_k: int) -> AotCase:
    return _case(
        f"low_rank_down reduce {sum_type} split {split_k}",
        reduce_kernel,
        {"workspace": f"*{sum_type}", "out": "*fp32", **_TERMS},
        ("tokens", "rank", "first", *_COLUMNS),
        {"HAS_SCALE": True, "HAS_LOW_RANK_SCALE": sum_type == "i32"},
        TileConfig.of(4, 1, SPLIT_K=split_k, **REDUCE_BLOCKS),
        "",
    )
