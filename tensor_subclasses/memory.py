# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The memory of a MASQuantTensor is that of its parts.

The wrapper itself has none: torch's own ways to its storage lead to a null pointer, and
some of them end the process. Bytes are those of the parts, too, so that what adds a
model's memory up from its parameters counts packed integers.
"""

import math
import sys
from typing import Any

import torch

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__: list[str] = []

aten = torch.ops.aten
implements = MASQuantTensor.implements
implements_torch_function = MASQuantTensor.implements_torch_function


@implements_torch_function(torch.Tensor.share_memory_)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    for part in args[0].parts().values():
        part.share_memory_()
    return args[0]


@implements_torch_function(torch.Tensor.is_shared)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(part.is_shared() for part in args[0].parts().values())


@implements(aten.is_pinned.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(part.is_pinned() for part in args[0].parts().values())


@implements(aten._pin_memory.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    return args[0]._apply_fn_to_data(lambda t: t.pin_memory())


@implements_torch_function(
    [
        torch.Tensor.untyped_storage,
        torch.Tensor._typed_storage,
        torch.Tensor.storage,
        torch.Tensor.data_ptr,
    ]
)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Of the integers, which no other weight has."""
    # torch makes a fake wrapper as it makes a fake plain tensor, after a storage of its
    # own, and does the same with each part.
    if _is_asked_by("torch._subclasses.meta_utils"):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    return func(args[0].qdata)


def _is_asked_by(module: str) -> bool:
    """Whether the first caller outside of this module and of torchao is a module."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in (__name__, "torchao.utils"):
            return name == module
        frame = frame.f_back  # type: ignore[assignment]
    return False


@implements_torch_function(torch.Tensor.__dlpack__)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    raise BufferError(
        "a MASQuantTensor is several tensors, which DLPack cannot hand over: hand over "
        "its dequantize(), or its parts one by one."
    )


class _BytesOfValue(float):
    """Bytes of one value, all that goes with it counted in; of many, whole bytes."""

    def __mul__(self, count: Any) -> Any:
        product = float(self) * count
        return round(product) if isinstance(count, int) else product

    __rmul__ = __mul__


@implements_torch_function(torch.Tensor.nbytes.__get__)  # type: ignore[attr-defined]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> int:
    return args[0].nbytes_stored


@implements_torch_function(torch.Tensor.element_size)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> float:
    return _BytesOfValue(args[0].nbytes_stored / max(1, math.prod(args[0].shape)))
