# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The library of ``masquant::`` operators, and how each of them is defined.

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

An operator is said once, by the annotated function that computes it
(:mod:`torchao_masquant.kernels.reference`): its schema is inferred from there.
"""

import inspect
from typing import Any, Callable, Optional, TypeVar

import torch

from torchao_masquant.kernels.no_gradient import without_gradient

_LIB = torch.library.Library("masquant", "DEF")

#: the operators on plain tensors that have kernels of their own for CPUs and GPUs
LOWERED = ("smooth_quantize", "low_rank_down", "int_linear", "weight_only_linear")
#: those that have them on a CPU
LOWERED_ON_CPU = (*LOWERED, "expert_int_linear")

#: those that have kernels of their own for GPUs alone
LOWERED_ON_GPUS = ("float_smooth_quantize", "float_low_rank_down", "float_linear")

_FUNCTIONS: dict[str, Callable[..., Any]] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(
    fake: Optional[Callable[..., Any]] = None, *, returns: Optional[str] = None
) -> Callable[[_Function], _Function]:
    """Define an operator by the annotated function of its name that computes it.

    Args:
        fake: makes an empty result, of what its parameters name of the operator's
            arguments. None for an operator that only a tensor subclass implements.
        returns: the results as a schema writes them, where they have names.

    Returns:
        A decorator that registers the function and gives it back.
    """

    def define(function: _Function) -> _Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        # The integers describe a weight. None of them is a size that a graph may vary.
        schema = schema.replace("SymInt", "int")
        if returns is not None:
            schema = f"{schema.partition(' -> ')[0]} -> {returns}"
        name = function.__name__
        _FUNCTIONS[name] = function
        _LIB.define(name + schema)
        _LIB.impl(name, function, "CompositeExplicitAutograd")
        if fake is None:
            without_gradient(name, _LIB)
        else:
            _register_fake(name, fake, tuple(inspect.signature(function).parameters))
        return function

    return define


def function_of(name: str) -> Callable[..., Any]:
    """The function that an operator was defined by, which runs on every device.

    Args:
        name: of the operator, without the namespace.
    """
    return _FUNCTIONS[name]


def _register_fake(
    name: str, fake: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    read = tuple(inspect.signature(fake).parameters)

    def result(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(arguments, args)), **kwargs}
        return fake(*(given[argument] for argument in read))

    torch.library.register_fake(f"masquant::{name}", result, lib=_LIB)


@operator()
def linear(
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
