# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``torch.cat``: pieces of a weight, put together again."""

from typing import Any, Optional, Sequence

import torch

from torchao_masquant.tensor_subclasses.fsdp_gathering import ROWS
from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__: list[str] = []

# Parts with a value for each input channel, and the dimension that these lie along.
_COLUMNS = {"qdata": 1, "act_pre_scale": 1, "act_shift": 1, "l1": 0}

# Of groups of input channels, where there is more than one.
_GROUPS = ("scale", "zero_point")


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
    joined: dict[str, Any] = {}
    names, attributes = first.__tensor_flatten__()
    for other in tensors[1:]:
        theirs = other.__tensor_flatten__()  # type: ignore[attr-defined]
        if (names, _without_k(attributes)) != (theirs[0], _without_k(theirs[1])):
            raise ValueError(
                f"torch.cat needs quantized weights of one layout: got {other!r} beside "
                f"{first!r}."
            )
    for name in names:
        parts = [getattr(t, name) for t in tensors]
        along = _dimension(first, name, dim, parts[0])
        if along is not None:
            joined[name] = torch.cat(parts, along)
        elif name == "modality_bias":
            # The first of columns has it, and the others zeros.
            joined[name] = torch.stack(parts).sum(0)
        elif all(torch.equal(p, parts[0]) for p in parts[1:]):
            joined[name] = parts[0].clone()
        else:
            raise ValueError(
                "torch.cat puts together what was one weight, with one smoothing: the "
                f"{name} of {first!r} and of a tensor behind it differ."
            )
    if dim == first.dim() - 1:
        attributes["in_features"] = sum(t.shape[-1] for t in tensors)
        odd = [t for t in tensors[:-1] if t.shape[-1] % 2]
        if odd and first.weight_bits <= 4:
            raise ValueError(
                "torch.cat puts whole bytes together, and an odd number of columns of "
                f"4 bits ends within one: got {odd[0]!r}."
            )
    return MASQuantTensor(**joined, **attributes)


def _without_k(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in attributes.items() if name != "in_features"}


def _dimension(
    first: MASQuantTensor, name: str, dim: int, part: torch.Tensor
) -> Optional[int]:
    """Which of a part's dimensions grows where a weight's does; None where none does."""
    if first.dim() == 3 and dim == 0:
        shared = name == "act_pre_scale" or (name == "act_shift" and part.dim() == 2)
        return None if shared else 0
    experts = first.dim() - 2
    rows = dim == experts
    if rows:
        return None if name not in ROWS else ROWS[name] + experts
    if name in _GROUPS:
        return 1 + experts if part.shape[-1] > 1 else None
    if name not in _COLUMNS:
        return None
    own = experts if part.dim() == 3 else 0
    return _COLUMNS[name] + own
