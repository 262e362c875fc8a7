# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``weight_only_linear`` for compilation ahead of time."""

from typing import Optional

import torch

from kernel_cases.case import AotCase
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.weight_only_linear import weight_only_linear_kernel
from torchao_masquant.kernels.gpu.weight_only_tilings import (
    CONFIGS,
    fallback,
    fitted,
    fitting,
    smoothed_here,
)

__all__ = ["aot_cases"]

# Arguments of the product and their types where all parts are there, in bfloat16.
_TENSORS = {
    "x": "*bf16",
    "pre_scale": "*fp32",
    "weight": "*u8",
    "workspace": "*bf16",
    "scale": "*fp32",
    "zero_point": "*i8",
    "hidden": "*fp32",
    "l2": "*bf16",
    "modality_bias": "*fp32",
    "ids": "*i64",
    "bias": "*bf16",
    "out": "*bf16",
}
_SIZES = (
    *("tokens", "out_features", "in_features", "rank", "modalities", "bias_rows"),
    *("stride_x", "stride_pre_scale", "stride_weight", "stride_scale"),
    *("stride_group", "stride_zero", "stride_zero_group", "stride_hidden"),
    *("stride_l2", "stride_modality_bias", "stride_ids"),
)
_ODD = ("tokens", "modalities", "bias_rows", "stride_scale", "stride_zero")
# Of a type of x: that of the other 16-bit operands, and the parts it is multiplied in.
_TYPES = {
    "bf16": ("*bf16", 1, 1, 1),
    "fp16": ("*fp16", 1, 2, 2),
    "fp32": ("*fp32", 3, 3, 3),
}


def aot_cases(architecture: Optional[str] = None) -> list[AotCase]:
    """Every tiling for every kind of weight, and the types of x with a few.

    Args:
        architecture: what runs there, such as "sm_90" or "gfx942"; None for what
            compiles for all. They differ in how 4-bit weights are unpacked.
    """
    ptx = architecture is not None and architecture.startswith("sm_")
    cases = []
    for packed in (True, False):
        for width in (0, 128):
            for config in CONFIGS:
                for full in (False, True):
                    cases.append(_case(config, "bf16", packed, width, full, ptx))
            for dtype, name in (("fp16", torch.float16), ("fp32", torch.float32)):
                configs = fitting(name)
                for tokens in (1, 4096):
                    config = fallback(tokens, configs)
                    cases.append(_case(config, dtype, packed, width, True, ptx))
    return cases


def _case(
    config: TileConfig, dtype: str, packed: bool, width: int, full: bool, ptx: bool
) -> AotCase:
    config = fitted(config, width, dtype == "fp32")
    name = f"weight_only_linear w{4 if packed else 8}"
    name += f"{f' group {width}' if width else ''} "
    name += "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
    name += f" split {config['SPLIT_K']} warps {config.num_warps}"
    operand, x_parts, hidden_parts, l2_parts = _TYPES[dtype]
    tensors = dict(_TENSORS)
    for tensor in ("x", "l2", "bias", "out"):
        tensors[tensor] = operand
    tensors["workspace"] = "*fp32" if config["SPLIT_K"] > 1 else operand
    if not packed:
        tensors["weight"] = "*i8"
    if not full:
        # scale stands for what there is not.
        for tensor in ("zero_point", "hidden", "l2", "modality_bias", "ids", "bias"):
            tensors[tensor] = "*fp32"
    ones = {"stride_ids": 1}
    if width:
        ones |= {"stride_group": 1, "stride_zero_group": 1}
    sizes = tuple(size for size in _SIZES if size not in ones)
    odd = _ODD if width else (*_ODD, "stride_group", "stride_zero_group")
    return AotCase(
        f"{name} {dtype} {'full' if full else 'bare'}",
        weight_only_linear_kernel,
        {**tensors, **dict.fromkeys(sizes, "i32")},
        {
            "PACKED": packed,
            "WIDTH": width,
            "EVEN_K": True,
            "SMOOTH": smoothed_here(config, full),
            "HAS_ZERO_POINT": full,
            "HAS_LOW_RANK": full,
            "HAS_MODALITY_BIAS": full,
            "HAS_IDS": full,
            "HAS_BIAS": full,
            "X_PARTS": x_parts,
            "HIDDEN_PARTS": hidden_parts,
            "L2_PARTS": l2_parts,
            "BF16_DOT": True,
            "PTX": ptx,
            **ones,
        },
        config,
        "",
        (*tensors, *(size for size in sizes if size not in odd)),
    )
