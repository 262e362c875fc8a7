# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``int_linear`` for compilation ahead of time."""

from typing import Any, Optional

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.int_linear import int_linear_kernel
from torchao_masquant.kernels.gpu.int_linear_tilings import (
    OWN_EPILOGUE,
    fallback,
    fitting,
    transposed,
)
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.linear_epilogue import REDUCE, reduce_kernel
from torchao_masquant.kernels.gpu.linear_tiles import with_block_k

__all__ = ["aot_cases"]

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
            for config in fitting(width, 1, architecture):
                cases.append(_gemm_case(packed, width, ptx, config, "full"))
            for variant in _VARIANTS:
                values = {**_FULL, **_VARIANTS[variant][1]}
                parts = values["HIDDEN_PARTS"] * values["L2_PARTS"]
                configs = fitting(width, parts, architecture)
                for tokens in (1, 4096):
                    config = fallback(tokens, configs)
                    cases.append(_gemm_case(packed, width, ptx, config, variant))
                # The one tiling for few tokens whose epilogue is its own.
                if OWN_EPILOGUE in configs:
                    cases.append(_gemm_case(packed, width, ptx, OWN_EPILOGUE, variant))
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
    multiplies: str,
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
        multiplies,
        tuple(n for n in signature if n not in odd),
    )


def _gemm_case(
    packed: bool, width: int, ptx: bool, config: TileConfig, variant: str
) -> AotCase:
    config = with_block_k(config, config["BLOCK_K"], width)
    name = f"int_linear w{4 if packed else 8}{f' group {width}' if width else ''} "
    name += "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
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
            "TRANSPOSED": transposed(config, width),
            "PTX": ptx,
            **_FULL,
        },
        config,
        variant,
        "int8",
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
        REDUCE,
        variant,
        "",
    )
