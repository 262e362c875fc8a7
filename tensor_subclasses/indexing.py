# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts and rows of a MASQuantTensor: ``weight[0]``, ``weight[torch.tensor([0, 2])]``."""

from typing import Any, Callable

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_masquant.tensor_subclasses.fsdp_gathering import ROWS
from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__: list[str] = []

aten = torch.ops.aten
implements = MASQuantTensor.implements


def _along_first(
    self: MASQuantTensor, take: Callable[[torch.Tensor, int], torch.Tensor]
) -> MASQuantTensor:
    """Take of each part what belongs to some experts, or to some rows.

    Args:
        take: from a part, along a dimension of it.
    """
    names, attributes = self.__tensor_flatten__()
    parts: dict[str, Any] = {name: getattr(self, name) for name in names}
    for name, part in parts.items():
        if self.dim() == 3:
            shared = name == "act_pre_scale" or (
                name == "act_shift" and part.dim() == 2
            )
            dim = None if shared else 0
        else:
            dim = ROWS.get(name)
        if dim is not None:
            parts[name] = take(part, dim)
    return MASQuantTensor(**parts, **attributes)


@implements(aten.select.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """The weight of one expert, or one row, as a view."""
    self, dim, index = args
    if self.dim() < 2 or dim not in (0, -self.dim()):
        raise ValueError(
            "of a MASQuantTensor experts and rows are taken one by one, as weight[0]: "
            f"got index {index} in dimension {dim} of {self!r}."
        )
    return return_and_correct_aliasing(
        func, args, kwargs, _along_first(self, lambda t, d: t.select(d, index))
    )


@implements([aten.index.Tensor, aten.index_select.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Some experts or some rows, a copy."""
    self = args[0]
    if func is aten.index_select.default:
        dim, index = args[1:]
        indices = [None] * (dim % self.dim()) + [index]
    else:
        indices = list(args[1])
    chosen = [i for i in indices if i is not None]
    if self.dim() < 2 or indices[:1] != chosen or chosen[0].dim() != 1:
        raise ValueError(
            "of a MASQuantTensor experts or rows are chosen, by one list of indices or "
            f"one mask, as weight[indices]: got another choice of {self!r}."
        )
    (index,) = chosen
    if index.dtype == torch.bool:
        if index.shape[0] != self.shape[0]:
            raise IndexError(
                f"a mask of {index.shape[0]} values does not fit the first dimension of "
                f"{self!r}."
            )
        index = index.nonzero().squeeze(1)
    index = index.to(self.device) % self.shape[0] if (index < 0).any() else index
    return _along_first(self, lambda t, d: t.index_select(d, index))
