# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``torch.cat``: pieces of a weight, put together again."""

from typing import Any, Sequence

import torch

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

__all__: list[str] = []


@MASQuantTensor.implements(torch.ops.aten.cat.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Of rows, of columns, or of experts, whose other parts are equal."""
    tensors: Sequence[torch.Tensor] = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    for tensor in tensors:
        if isinstance(tensor, MASQuantTensor):
            tensor.refuse_if_flat()
    first = tensors[0]
    if not all(isinstance(t, MASQuantTensor) for t in tensors):
        raise ValueError(
            "torch.cat puts quantized weights together, or plain tensors, and not both: "
            "dequantize() the quantized ones."
        )
    assert isinstance(first, MASQuantTensor)
    dim = dim % first.dim()
    names, attributes = first.__tensor_flatten__()
    for other in tensors[1:]:
        theirs = other.__tensor_flatten__()  # type: ignore[attr-defined]
        if (names, _without_k(attributes)) != (theirs[0], _without_k(theirs[1])):
            raise ValueError(
                f"torch.cat needs quantized weights of one layout: got {other!r} beside "
                f"{first!r}."
            )
    along = _dimensions(first, dim)
    joined: dict[str, torch.Tensor] = {}
    for name in names:
        parts = [getattr(t, name) for t in tensors]
        if name in along:
            joined[name] = torch.cat(parts, along[name])
        elif PARTS[name].added:
            # The first of columns has it, and the others zeros.
            joined[name] = torch.stack(parts).sum(0)
        elif all(torch.equal(p, parts[0]) for p in parts[1:]):
            joined[name] = parts[0].clone()
        else:
            raise ValueError(
                "torch.cat puts together what was one weight, with one smoothing: the "
                f"{name} of {first!r} and of a tensor behind it differ."
            )
    in_features = first.in_features
    if dim == first.dim() - 1:
        in_features = sum(t.shape[-1] for t in tensors)
        odd = [t for t in tensors[:-1] if t.shape[-1] % 2]
        if odd and first.weight_layout.grid.per_byte == 2:
            raise ValueError(
                "torch.cat puts whole bytes together, and an odd number of columns of "
                f"4 bits ends within one: got {odd[0]!r}."
            )
    return first.with_parts(joined, in_features=in_features)


def _without_k(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in attributes.items() if name != "in_features"}


def _dimensions(first: MASQuantTensor, dim: int) -> dict[str, int]:
    """Name of each part that grows where a weight's dimension does, to its own."""
    parts = first.parts()
    if dim == first.dim() - 3:
        return {n: 0 for n, t in parts.items() if PARTS[n].is_of_each_expert(t)}
    columns = "KBG" if first.weight_layout.grouped else "KB"
    grown = "N" if dim == first.dim() - 2 else columns
    return {
        name: along
        for name in parts
        for symbol in grown
        if (along := PARTS[name].dim(symbol)) is not None
    }
