# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Schemas and fake implementations of the ``masquant::`` operators.

``masquant::linear`` is what a module calls: its ``weight`` is a tensor subclass
that carries the quantized matrix and implements the operator by desugaring it to
the plain-tensor operators below, in this order::

    qx, sx = smooth_quantize(x, act_pre_scale, modality_ids, act_bits, act_shift, b)
    h      = low_rank_down(qx, sx, l1, modality_ids, ranks)       # mixed calls only
    y      = int_linear(qx, sx, qdata, scale, h, l2, ...)

or, where activations are not quantized, to ``weight_only_linear`` alone. All of them
take tokens as one flat dimension T. A base-only call passes ``modality_ids=None`` and
runs no low-rank work at all. A pair of int8 comes with one ``low_rank_scale`` for both
of its sides, which multiplies what is between them. ``hadamard_size`` b rotates what is
smoothed, so that integers and pairs are of rotated channels
(:mod:`torchao_masquant.kernels.hadamard`).

``smoothed_by`` is a weight with the same smoothing factors, shift, rotation and bits of
activations, whose own are read in their place: the calls of ``smooth_quantize`` of
linears that share an input are then equal, and a compiled graph keeps one of them
(:mod:`torchao_masquant.kernels.shared_prologue`). So it does on a GPU with the launches
that smooth for ``weight_only_linear``; on a CPU that is a part of the operator.
"""

from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.no_gradient import without_gradient

_LIB = torch.library.Library("masquant", "DEF")

#: the operators on plain tensors that have kernels of their own for a device
LOWERED = ("smooth_quantize", "low_rank_down", "int_linear", "weight_only_linear")

_LIB.define(
    "linear(Tensor x, Tensor weight, Tensor? modality_ids=None, Tensor? bias=None,"
    " Tensor? smoothed_by=None) -> Tensor"
)
_LIB.define(
    "smooth_quantize(Tensor x, Tensor act_pre_scale, Tensor? modality_ids,"
    " int act_bits, Tensor? act_shift=None, int hadamard_size=1)"
    " -> (Tensor qdata, Tensor scale)"
)
_LIB.define(
    "low_rank_down(Tensor qdata, Tensor scale, Tensor l1, Tensor modality_ids,"
    " int[] ranks, Tensor? low_rank_scale=None) -> Tensor"
)
_LIB.define(
    "int_linear(Tensor qx, Tensor x_scale, Tensor qdata, Tensor scale,"
    " Tensor? low_rank_hidden, Tensor? l2, Tensor? modality_bias,"
    " Tensor? modality_ids, Tensor? bias, int weight_bits, ScalarType out_dtype)"
    " -> Tensor"
)
_LIB.define(
    "weight_only_linear(Tensor x, Tensor act_pre_scale, Tensor qdata, Tensor scale,"
    " Tensor? zero_point, Tensor? l1, Tensor? l2, Tensor? modality_bias,"
    " Tensor? modality_ids, Tensor? bias, int[] ranks, int weight_bits,"
    " ScalarType out_dtype, Tensor? low_rank_scale=None, int hadamard_size=1)"
    " -> Tensor"
)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    modality_ids: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    smoothed_by: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    raise TypeError(
        "masquant::linear takes a MASQuantTensor as its weight, got a plain "
        f"{weight.dtype} tensor of shape {tuple(weight.shape)}; use "
        "torch.nn.functional.linear for an unquantized weight."
    )


_LIB.impl("linear", _linear, "CompositeExplicitAutograd")


without_gradient("linear", _LIB)


@torch.library.register_fake("masquant::smooth_quantize")
def _(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, x.shape[1]), dtype=torch.int8),
        x.new_empty((tokens, 1), dtype=torch.float32),
    )


@torch.library.register_fake("masquant::low_rank_down")
def _(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    return qdata.new_empty((qdata.shape[0], l1.shape[1]), dtype=torch.float32)


@torch.library.register_fake("masquant::int_linear")
def _(
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
) -> torch.Tensor:
    return qx.new_empty((qx.shape[0], qdata.shape[0]), dtype=out_dtype)


@torch.library.register_fake("masquant::weight_only_linear")
def _(
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
) -> torch.Tensor:
    return x.new_empty((x.shape[0], qdata.shape[0]), dtype=out_dtype)
