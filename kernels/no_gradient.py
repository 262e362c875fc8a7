# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators that have no derivative, and say so to whoever asks for one."""

from typing import Any, Sequence

import torch
from torch.autograd import forward_ad

__all__ = ["without_gradient"]

_LIB = torch.library.Library("masquant", "FRAGMENT")

# Stands in a backward pass for a gradient that there is not. An operator and not an
# exception raised at once: torch.compile traces the backward pass of any model with a
# bias that requires grad, though most never run it.
_LIB.define("no_gradient(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor")

_REFUSAL = (
    "masquant::linear has no gradient: its rounding has none. Run quantized linears "
    "under torch.no_grad(), or detach() their {}."
)


def _no_gradient(
    grad: torch.Tensor, size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    raise RuntimeError(_REFUSAL.format("outputs"))


_LIB.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("masquant::no_gradient")
def _(grad: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return grad.new_empty(size, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.described = [None if t is None else (t.shape, t.dtype) for t in inputs]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # zip: the dispatcher leaves off arguments that have their default value.
    return tuple(
        torch.ops.masquant.no_gradient(grad, *described) if needed else None
        for described, needed in zip(ctx.described, ctx.needs_input_grad)
    )


def _has_tangent(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        # A quantized weight: a wrapper, of parts that are constants.
        and not hasattr(value, "__tensor_flatten__")
        and value.is_floating_point()
        and forward_ad.unpack_dual(value).tangent is not None
    )


class _Refusing:
    """A library to register an autograd formula with, which forward mode is told of.

    torch's own formula gives tangents of zero, since it is asked for none.
    """

    def __init__(self, lib: torch.library.Library):
        self.lib = lib

    def impl(self, name: str, kernel: Any, key: str, **options: Any) -> None:
        def refusing(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            # Outside of a level there are no tangents.
            if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
                raise RuntimeError(_REFUSAL.format("inputs"))
            return kernel(keyset, *args, **kwargs)

        self.lib.impl(name, refusing, key, **options)


def without_gradient(name: str, lib: torch.library.Library) -> None:
    """Let an operator raise where it is differentiated, forwards or backwards.

    Without it autograd leaves the operator's part out of all derivatives: backwards with
    a warning, forwards without.

    Args:
        name: of an operator of ``masquant::``; it has been given its implementation.
        lib: that it is part of.
    """
    torch.library.register_autograd(
        f"masquant::{name}",
        _backward,
        setup_context=_setup_context,
        lib=_Refusing(lib),
    )
