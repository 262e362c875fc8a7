# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the Triton kernels cannot do, each said in one sentence before a launch.

A kernel that reads past its operands or takes one type for another does not raise, so
these look at shapes, types and devices. They look at no value: ids out of range are the
router's to refuse, once in a forward, and a kernel writes nan for them or reads none.
The number of tokens may be symbolic and is not compared.
"""

from typing import Any, Mapping, Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import check_hadamard_size
from torchao_masquant.kernels.number_formats import NumberFormat, number_format

__all__ = ["check_operands"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT32 = (torch.float32,)
_INT8 = (torch.int8,)
_PAIR = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_Operand = tuple[Sequence[torch.dtype], tuple[Optional[str], ...]]

# The types and the shape that an operand may have. Sizes of one letter are equal within a
# call, None may be any. "B" are bytes of a row of weights.
_WEIGHT: dict[str, _Operand] = {
    "qdata": ((torch.int8, torch.uint8), ("N", "B")),
    "scale": (_FLOAT32, ("N", "G")),
}
_BIASES: dict[str, _Operand] = {
    "modality_bias": (_FLOATS, (None, "N")),
    "modality_ids": (_IDS, (None,)),
    "bias": (_FLOATS, ("N",)),
}
_SMOOTHED: dict[str, _Operand] = {
    "x": (_FLOATS, (None, "K")),
    "act_pre_scale": (_FLOAT32, ("M", "K")),
    "act_shift": (_FLOAT32, ("M", "K")),
    "modality_ids": (_IDS, (None,)),
}
_OPERANDS: dict[str, dict[str, _Operand]] = {
    "smooth_quantize": _SMOOTHED,
    "float_smooth_quantize": _SMOOTHED,
    "low_rank_down": {
        "qdata": (_INT8, (None, "K")),
        "scale": (_FLOAT32, (None, "1")),
        "l1": (_PAIR, ("K", "R")),
        "modality_ids": (_IDS, (None,)),
        "low_rank_scale": (_FLOAT32, ("R",)),
    },
    "int_linear": {
        "qx": (_INT8, (None, "K")),
        "x_scale": (_FLOAT32, (None, "1")),
        **_WEIGHT,
        "l2": (_PAIR, ("R", "N")),
        "low_rank_hidden": (_FLOAT32, (None, "R")),
        **_BIASES,
    },
    # "P" are bytes of a token, "X" scales of its groups; types are those of the formats.
    "float_low_rank_down": {
        "qdata": ((), (None, "P")),
        "scale": ((), (None, "X")),
        "token_scale": (_FLOAT32, (None, "1")),
        "l1": (_PAIR, ("K", "R")),
        "modality_ids": (_IDS, (None,)),
        "low_rank_scale": (_FLOAT32, ("R",)),
    },
    "float_linear": {
        "qx": ((), (None, "P")),
        "x_scale": ((), (None, "X")),
        "token_scale": (_FLOAT32, (None, "1")),
        "qdata": ((), ("N", "B")),
        "scale": ((), ("N", "G")),
        "row_scale": (_FLOAT32, ("N",)),
        "l2": (_PAIR, ("R", "N")),
        "low_rank_hidden": (_FLOAT32, (None, "R")),
        **_BIASES,
    },
    "weight_only_linear": {
        "x": (_FLOATS, (None, "K")),
        "act_pre_scale": (_FLOAT32, ("M", "K")),
        **_WEIGHT,
        "zero_point": (_INT8, ("N", "G")),
        "l1": (_PAIR, ("K", "R")),
        "l2": (_PAIR, ("R", "N")),
        "low_rank_scale": (_FLOAT32, ("R",)),
        **_BIASES,
    },
}
# What goes up needs a matrix to go up by.
_UP = {
    "int_linear": "low_rank_hidden",
    "float_linear": "low_rank_hidden",
    "weight_only_linear": "l1",
}
# What is held in the tokens' number format, and in the weight's.
_OF_TOKENS = {
    "float_low_rank_down": ("qdata", "scale"),
    "float_linear": ("qx", "x_scale"),
}


def check_operands(operator: str, given: Mapping[str, Any]) -> None:
    """Raise on what the kernels of an operator do not read.

    Args:
        operator: its name, without the namespace.
        given: the arguments of a call by name; those may be left out that have defaults.

    Raises:
        TypeError: an operand, or the result, is of a type that the kernel does not know.
        ValueError: an operand is of another shape or device, or the bits, groups or
            rotation do not fit.
    """
    name = f"masquant::{operator}"
    operands = _OPERANDS[operator]
    first = given[next(iter(operands))]
    sizes: dict[Optional[str], int] = {"1": 1}
    if "act_bits" in given:
        _check_bits(name, "activations", "act_bits", given["act_bits"])
    if given.get("hadamard_size", 1) != 1:
        check_hadamard_size(given["hadamard_size"], first.shape[-1])
    held: dict[str, torch.dtype] = {}
    width = first.shape[-1]
    form = number_format(given["act_format"]) if "act_format" in given else None
    if form is not None:
        held, width = _held_tokens(operator, form, width)
        groups = width // (form.group_size or width)
        if width % (form.group_size or 1):
            raise ValueError(
                f"{name}: groups of {form.group_size} do not divide {width} features, as "
                f"{form.name!r} asks for."
            )
        sizes.update(K=width, P=width // form.grid.per_byte, X=groups)
    weight_bits = given.get("weight_bits")
    if weight_bits is not None:
        _check_bits(name, "weights", "weight_bits", weight_bits)
        held |= _held_weight(weight_bits, given.get("weight_format"))
        sizes["B"] = (width + 1) // 2 if held["qdata"] == torch.uint8 else width
    for operand, (dtypes, shape) in operands.items():
        tensor = given.get(operand)
        if tensor is None:
            continue
        if operand in held:
            dtypes = (held[operand],)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise TypeError(f"{name}: {operand} is {tensor.dtype}, must be {wanted}.")
        found = tensor.shape
        fits = len(found) == len(shape)
        if fits:
            for symbol, size in zip(shape, found):
                if symbol is not None and sizes.setdefault(symbol, size) != size:
                    fits = False
        if not fits:
            wanted = ", ".join(str(sizes.get(symbol, "*")) for symbol in shape)
            raise ValueError(
                f"{name}: {operand} has shape {tuple(found)}, must be ({wanted})."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: {operand} is on {tensor.device} and what it is computed with "
                f"on {first.device}: move them to one device."
            )
    if "G" in sizes and (sizes["G"] == 0 or sizes["K"] % sizes["G"]):
        raise ValueError(
            f"{name}: {sizes['G']} scales a channel do not divide {sizes['K']} features "
            "into groups of one width."
        )
    up = _UP.get(operator)
    if up is not None and given[up] is not None and given["l2"] is None:
        raise ValueError(f"{name}: {up} needs an l2 to go up by.")
    if given.get("out_dtype", torch.float32) not in _FLOATS:
        raise TypeError(
            f"{name}: a result is float16, bfloat16, float32 or float64, got "
            f"{given['out_dtype']}."
        )


def _held_tokens(
    operator: str, form: NumberFormat, width: int
) -> tuple[dict[str, torch.dtype], int]:
    """Types of what is held in the tokens' format, and K of what is first."""
    if operator not in _OF_TOKENS:
        return {}, width
    codes, scale = _OF_TOKENS[operator]
    types = {codes: form.grid.dtype, scale: form.scale_dtype}
    return types, width * form.grid.per_byte


def _held_weight(bits: int, weight_format: Optional[str]) -> dict[str, torch.dtype]:
    """Types of a weight in a number format, or of integers."""
    if weight_format is None:
        integers = torch.uint8 if bits <= 4 else torch.int8
        return {"qdata": integers, "scale": torch.float32}
    form = number_format(weight_format)
    return {"qdata": form.grid.dtype, "scale": form.scale_dtype}


def _check_bits(name: str, what: str, argument: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{name}: {what} have 2 to 8 bits, got {argument}={bits}.")
