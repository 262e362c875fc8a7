# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""New tensors that are made after a MASQuantTensor.

``empty_like`` makes room for another weight of the same layout. All others are asked for
values, which packed integers would have to be rounded to: they make plain tensors.
"""

from typing import Any, Optional

import torch

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__: list[str] = []

aten = torch.ops.aten
implements = MASQuantTensor.implements


@implements(aten.empty_like.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Quantized, on any device, for any floating point type."""
    self = args[0]
    dtype = kwargs.get("dtype") or self.dtype
    if not dtype.is_floating_point:
        raise ValueError(
            f"a MASQuantTensor stands for a floating point weight, not for {dtype}: give "
            "torch.empty its shape."
        )
    if kwargs.get("layout") not in (None, torch.strided):
        raise ValueError(
            f"a MASQuantTensor is strided, and can't be of layout {kwargs['layout']}."
        )
    options: dict[str, Any] = {"memory_format": torch.contiguous_format}
    for name in ("device", "pin_memory"):
        if kwargs.get(name) is not None:
            options[name] = kwargs[name]
    return self.with_dtype(dtype)._apply_fn_to_data(
        lambda t: torch.empty_like(t, **options)
    )


def _dense(self: MASQuantTensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a plain tensor is made with that follows this one."""
    return {**kwargs, **_given(self, kwargs)}


def _given(self: MASQuantTensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    dtype: Optional[torch.dtype] = kwargs.get("dtype")
    device: Optional[torch.device] = kwargs.get("device")
    return {
        "dtype": self.dtype if dtype is None else dtype,
        "device": self.device if device is None else device,
    }


@implements(
    [
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.randint_like.default,
        aten.randint_like.low_dtype,
    ]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Plain, of the weight's shape."""
    like = torch.empty(args[0].shape, **_given(args[0], kwargs))
    return func(like, *args[1:], **_dense(args[0], kwargs))


@implements(
    [
        aten.new_empty.default,
        aten.new_full.default,
        aten.new_ones.default,
    ]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Plain, of any shape."""
    like = torch.empty(0, **_given(args[0], kwargs))
    return func(like, *args[1:], **_dense(args[0], kwargs))
