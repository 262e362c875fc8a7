# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Pieces of a MASQuantTensor.

Experts and rows, ``weight[0]`` and ``weight[torch.tensor([0, 2])]``, and slices of rows
and of columns, ``weight[:8]`` and ``weight[:, :64]``, of all experts ``weight[:, :8]`` and
``weight[:, :, :64]``.
"""

from typing import Any, Callable

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

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
    parts = self.parts()
    for name, part in parts.items():
        dim = PARTS[name].dim("N")
        if self.dim() == 3:
            dim = 0 if PARTS[name].is_of_each_expert(part) else None
        if dim is not None:
            parts[name] = take(part, dim)
    return self.with_parts(parts)


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


@implements(aten.slice.Tensor)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Rows (output channels) or columns (input channels), step 1, as views.

    The outputs of the column slices of a weight add up to the whole's: the modality
    bias rides with the slice that holds column 0.
    """
    self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim = dim - self.dim() if dim >= 0 else dim
    if dim not in (-2, -1):
        raise ValueError(
            f"the experts of a MASQuantTensor are not sliced, but taken one by one, as "
            f"weight[e]: got {self!r}."
        )
    if step != 1:
        raise ValueError(f"MASQuantTensor slices with step 1 only, got step={step}.")
    size = self.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    end = max(start, end)
    if dim == -2:
        spans, columns = {"N": (start, end)}, self.in_features
    else:
        multiple = self.column_multiple
        if start % multiple or (end % multiple and end != size):
            raise ValueError(
                f"columns {start}:{end} of a MASQuantTensor of shape "
                f"{tuple(self.shape)} must start and end on a multiple of {multiple} "
                f"({self.column_units})."
            )
        spans, columns = self.weight_layout.column_spans(start, end), end - start
    parts = self.parts()
    for name, part in parts.items():
        for symbol, span in spans.items():
            along = PARTS[name].dim(symbol)
            if along is not None:
                parts[name] = aten.slice.Tensor(part, along, *span)
        if dim == -1 and start > 0 and PARTS[name].added:
            parts[name] = torch.zeros_like(part)
    return return_and_correct_aliasing(
        func, args, kwargs, self.with_parts(parts, in_features=columns)
    )
