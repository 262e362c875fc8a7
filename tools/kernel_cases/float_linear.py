# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``float_linear`` for compilation ahead of time."""

from typing import Any, NamedTuple, Optional

import torch

from kernel_cases.case import AotCase
from torchao_masquant.kernels.float_instructions import Product, product_on
from torchao_masquant.kernels.gpu.float_codes import FLOAT32, NONE, Operand
from torchao_masquant.kernels.gpu.float_linear import (
    float_linear_kernel,
    operand_flags,
    product_of,
    width_of,
)
from torchao_masquant.kernels.gpu.float_linear_tilings import (
    fitted,
    fitting,
    transposed,
)
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.number_formats import number_format

__all__ = ["aot_cases"]

_FEATURES = 3584


class _Scheme(NamedTuple):
    """Formats of both sides, and the groups of a weight of integers."""

    act_format: str
    weight_format: Optional[str]
    groups: int = 1

    def operands(self) -> tuple[Operand, Operand]:
        return (
            _operand(self.act_format, 1),
            _operand(self.weight_format, self.groups),
        )


def _operand(name: Optional[str], groups: int) -> Operand:
    dtype = torch.float32
    if name is not None:
        form = number_format(name)
        groups = _FEATURES // (form.group_size or _FEATURES)
        dtype = form.scale_dtype
    scale = torch.empty((1, groups), dtype=dtype, device="meta")
    return Operand.of(name, 4, scale, _FEATURES)


_SCHEMES = {
    "fp8": _Scheme("e4m3", "e4m3"),
    "fp8-block": _Scheme("e4m3-128", "e4m3-128"),
    "w4a8-fp8": _Scheme("e4m3", None),
    "w4a8-fp8 group 128": _Scheme("e4m3", None, _FEATURES // 128),
    "nvfp4": _Scheme("nvfp4", "nvfp4"),
    "mxfp4": _Scheme("mxfp4", "mxfp4"),
    "mxfp8": _Scheme("mxfp8", "mxfp8"),
}
# Types where all parts are there, and constexprs, of a call in bfloat16 and in float32.
_FULL = {
    "bf16": ({"l2": "*bf16", "bias": "*bf16", "out": "*bf16"}, 1),
    "fp32": ({"l2": "*fp32", "bias": "*fp32", "out": "*fp32"}, 3),
}
_SIZES = (
    *("tokens", "out_features", "in_features", "rank", "modalities"),
    *("stride_x", "stride_weight", "stride_x_groups", "stride_groups"),
    *("stride_scale", "stride_hidden", "stride_l2", "stride_modality_bias"),
)
_ODD = ("tokens", "modalities", "stride_x_groups", "stride_groups", "stride_scale")


def aot_cases(architecture: Optional[str] = None) -> list[AotCase]:
    """Every tiling of every scheme, by what the architecture multiplies it with.

    Args:
        architecture: such as "sm_90" or "gfx942"; None: as where there is no instruction.
    """
    cases = []
    for scheme in _SCHEMES:
        x, weight = _SCHEMES[scheme].operands()
        wanted = product_on(architecture, _SCHEMES[scheme].act_format)
        product, width = product_of(wanted, x, weight), width_of(x, weight)
        configs = fitting(width, architecture)
        for dtype in _FULL:
            for config in configs:
                # Parts of a pair are in an epilogue.
                if dtype == "bf16" or config["SPLIT_K"] == 1:
                    cases.append(_case(scheme, product, config, dtype, True))
        cases.append(_case(scheme, product, configs[-1], "bf16", False))
    return cases


def _case(
    scheme: str, product: Product, config: TileConfig, dtype: str, even: bool
) -> AotCase:
    x, weight = _SCHEMES[scheme].operands()
    width = width_of(x, weight)
    config = fitted(config, product, width)
    types, parts = _FULL[dtype]
    tensors = {
        "x": "*u8",
        "weight": "*u8",
        "workspace": "*fp32" if config["SPLIT_K"] > 1 else types["out"],
        "x_groups": "*fp32" if x.scale == FLOAT32.value else "*u8",
        "groups": "*fp32" if weight.scale == FLOAT32.value else "*u8",
        "x_scale": "*fp32",
        "scale": "*fp32",
        "hidden": "*fp32",
        "modality_bias": "*fp32",
        "ids": "*i64",
        **types,
    }
    of_token = x.scale == NONE.value or scheme == "nvfp4"
    of_row = weight.scale == NONE.value or scheme == "nvfp4"
    flags: dict[str, Any] = {
        **operand_flags(product, x, weight, config["BLOCK_K"], _FEATURES),
        "PER_CHANNEL": of_row,
        "HAS_X_SCALE": of_token,
        "HAS_LOW_RANK": True,
        "HAS_MODALITY_BIAS": True,
        "HAS_IDS": True,
        "HAS_BIAS": True,
        "HIDDEN_PARTS": parts,
        "L2_PARTS": parts,
        "BF16_DOT": True,
        "TRANSPOSED": transposed(config, width),
        "stride_x_scale": 1,
        "stride_ids": 1,
    }
    if not even:
        flags["EVEN_K"] = False
    name = f"float_linear {scheme} by {product.name.lower()} "
    name += "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
    name += f" split {config['SPLIT_K']} {dtype}{'' if even else ' uneven K'}"
    return AotCase(
        name,
        float_linear_kernel,
        {**tensors, **dict.fromkeys(_SIZES, "i32")},
        flags,
        config,
        _instruction(scheme, product),
        (*tensors, *(size for size in _SIZES if size not in _ODD)),
    )


def _instruction(scheme: str, product: Product) -> str:
    if product is Product.DECODED:
        return "bfloat16"
    return scheme if product is Product.SCALED else "e4m3"
