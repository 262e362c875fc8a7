# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the Triton kernels cannot do, each said in one sentence before a launch.

A kernel that reads past its operands or takes one type for another does not raise, so
these look at shapes, types and devices. They look at no value: ids out of range are the
router's to refuse, once in a forward, and a kernel writes nan for them or reads none.
Sizes in tokens may be symbolic and are not compared.
"""

from typing import Optional, Sequence, Union

import torch

from torchao_masquant.kernels.hadamard import check_hadamard_size

__all__ = [
    "check_int_linear",
    "check_low_rank_down",
    "check_smooth_quantize",
    "check_weight_only_linear",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_Dtypes = Union[torch.dtype, Sequence[torch.dtype]]


def _check(
    operator: str,
    name: str,
    tensor: Optional[torch.Tensor],
    dtypes: _Dtypes,
    shape: tuple[Optional[int], ...],
    device: torch.device,
) -> None:
    """None in place of a size: any. A tensor that is None has nothing wrong with it."""
    if tensor is None:
        return
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{operator}: {name} is {tensor.dtype}, must be {wanted}.")
    if tensor.dim() != len(shape) or any(
        wanted is not None and size != wanted
        for size, wanted in zip(tensor.shape, shape)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, must be ({wanted})."
        )
    if tensor.device != device:
        raise ValueError(
            f"{operator}: {name} is on {tensor.device} and what it is computed with on "
            f"{device}: move them to one device."
        )


def _check_weight(
    operator: str,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    in_features: int,
    weight_bits: int,
    device: torch.device,
) -> None:
    if not 2 <= weight_bits <= 8:
        raise ValueError(
            f"{operator}: weights have 2 to 8 bits, got weight_bits={weight_bits}."
        )
    packed = weight_bits <= 4
    width = (in_features + 1) // 2 if packed else in_features
    dtype = torch.uint8 if packed else torch.int8
    _check(operator, "qdata", qdata, dtype, (None, width), device)
    _check(operator, "scale", scale, torch.float32, (qdata.shape[0], None), device)
    if scale.shape[1] == 0 or in_features % scale.shape[1]:
        raise ValueError(
            f"{operator}: {scale.shape[1]} scales a channel do not divide "
            f"{in_features} features into groups of one width."
        )


def check_smooth_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> None:
    """
    Raises:
        TypeError: an operand is of a type that the kernel does not read.
        ValueError: of another shape or device, there are too few or too many bits, or a
            rotation does not fit.
    """
    name = "masquant::smooth_quantize"
    if not 2 <= act_bits <= 8:
        raise ValueError(
            f"{name}: activations have 2 to 8 bits, got act_bits={act_bits}."
        )
    device = x.device
    features = x.shape[-1]
    if hadamard_size != 1:
        check_hadamard_size(hadamard_size, features)
    _check(name, "x", x, _FLOATS, (None, None), device)
    table = (None, features)
    _check(name, "act_pre_scale", act_pre_scale, torch.float32, table, device)
    shape = (act_pre_scale.shape[0], features)
    _check(name, "act_shift", act_shift, torch.float32, shape, device)
    _check(name, "modality_ids", modality_ids, _IDS, (None,), device)


def check_low_rank_down(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor] = None,
) -> None:
    """
    Raises:
        TypeError: an operand is of a type that the kernel does not read.
        ValueError: of another shape or device.
    """
    name = "masquant::low_rank_down"
    device = qdata.device
    _check(name, "qdata", qdata, torch.int8, (None, None), device)
    _check(name, "scale", scale, torch.float32, (None, 1), device)
    _check(name, "l1", l1, (*_FLOATS[:3], torch.int8), (qdata.shape[1], None), device)
    _check(name, "modality_ids", modality_ids, _IDS, (None,), device)
    factors = (l1.shape[1],)
    _check(name, "low_rank_scale", low_rank_scale, torch.float32, factors, device)


def check_int_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    weight_bits: int,
    out_dtype: torch.dtype,
) -> None:
    """
    Raises:
        TypeError: an operand is of a type that the kernel does not read.
        ValueError: of another shape or device, or the bits or groups do not fit.
    """
    name = "masquant::int_linear"
    device = qx.device
    _check(name, "qx", qx, torch.int8, (None, None), device)
    _check(name, "x_scale", x_scale, torch.float32, (None, 1), device)
    _check_weight(name, qdata, scale, qx.shape[1], weight_bits, device)
    out_features = qdata.shape[0]
    up = (None, out_features)
    _check(name, "l2", l2, (*_FLOATS[:3], torch.int8), up, device)
    if low_rank_hidden is not None:
        if l2 is None:
            raise ValueError(f"{name}: low_rank_hidden needs an l2 to go up by.")
        hidden = (None, l2.shape[0])
        _check(name, "low_rank_hidden", low_rank_hidden, torch.float32, hidden, device)
    _check(name, "modality_bias", modality_bias, _FLOATS, up, device)
    _check(name, "modality_ids", modality_ids, _IDS, (None,), device)
    _check(name, "bias", bias, _FLOATS, (out_features,), device)
    _check_out(name, out_dtype)


def check_weight_only_linear(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> None:
    """
    Raises:
        TypeError: an operand is of a type that the kernel does not read.
        ValueError: of another shape or device, or the bits, groups or rotation do not
            fit.
    """
    name = "masquant::weight_only_linear"
    device = x.device
    _check(name, "x", x, _FLOATS, (None, None), device)
    features = x.shape[1]
    if hadamard_size != 1:
        check_hadamard_size(hadamard_size, features)
    table = (None, features)
    _check(name, "act_pre_scale", act_pre_scale, torch.float32, table, device)
    _check_weight(name, qdata, scale, features, weight_bits, device)
    out_features, groups = scale.shape
    _check(name, "zero_point", zero_point, torch.int8, (out_features, groups), device)
    pair = (*_FLOATS[:3], torch.int8)
    _check(name, "l1", l1, pair, (features, None), device)
    if l1 is not None:
        if l2 is None:
            raise ValueError(f"{name}: l1 needs an l2 to go up by.")
        rank = l1.shape[1]
        _check(name, "l2", l2, pair, (rank, out_features), device)
        factors = (rank,)
        _check(name, "low_rank_scale", low_rank_scale, torch.float32, factors, device)
    extra = (None, out_features)
    _check(name, "modality_bias", modality_bias, _FLOATS, extra, device)
    _check(name, "modality_ids", modality_ids, _IDS, (None,), device)
    _check(name, "bias", bias, _FLOATS, (out_features,), device)
    _check_out(name, out_dtype)


def _check_out(operator: str, out_dtype: torch.dtype) -> None:
    if out_dtype not in _FLOATS:
        raise TypeError(
            f"{operator}: a result is float16, bfloat16, float32 or float64, got "
            f"{out_dtype}."
        )
