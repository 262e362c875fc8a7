# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``distribute_tensor`` and ``fully_shard`` do to a MASQuantTensor.

Pieces are slices: rows are output channels, columns input channels. All pieces are of
one size, since padding would have to be quantized.
"""

from functools import partial
from typing import Any, Callable, Sequence

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

aten = torch.ops.aten
c10d = torch.ops.c10d
implements = MASQuantTensor.implements


@implements(aten.split.Tensor)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    self, size = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if self.shape[dim] % size:
        raise ValueError(
            f"a MASQuantTensor of shape {tuple(self.shape)} can't be cut into pieces of "
            f"{size} along dimension {dim}, which do not come out even: shard it over a "
            f"number of ranks that divides {self.shape[dim]}, or keep it whole on each."
        )
    return [
        aten.slice.Tensor(self, dim, start, start + size)
        for start in range(0, self.shape[dim], size)
    ]


@implements(aten.new_zeros.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """For FSDP2: where a rank's rows are put."""
    self, size = args[:2]
    if len(size) != 2 or size[0] > self.shape[0] or size[1] != self.shape[1]:
        raise ValueError(
            "fully_shard shards the rows of a quantized weight only, and new_zeros makes "
            f"some of them, not {tuple(size)} of shape {tuple(self.shape)}: leave "
            "shard_placement_fn out, or let it return Shard(0)."
        )
    dtype, device = kwargs.get("dtype") or self.dtype, kwargs.get("device")
    rows = aten.slice.Tensor(self, 0, 0, size[0]).with_dtype(dtype)
    return rows._apply_fn_to_data(
        lambda t: torch.zeros_like(
            t, device=device, memory_format=torch.contiguous_format
        )
    )


@implements([aten.view.default, aten.as_strided.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """For FSDP2, which asks for shapes that it never looks at: the tensor as it is."""
    self, size = args[:2]
    if tuple(size) not in ((-1,), tuple(self.shape)):
        raise ValueError(
            f"a MASQuantTensor of shape {tuple(self.shape)} can't be seen as {tuple(size)}."
        )
    seen = self._apply_fn_to_data(lambda t: t)
    seen.is_flat = tuple(size) == (-1,)
    return return_and_correct_aliasing(func, args, kwargs, seen)


def _parts(tensor: MASQuantTensor) -> list[torch.Tensor]:
    return list(tensor.parts().values())


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Any:
    """Run collectives one after the other; the last one's result stands for all."""
    for call in calls[:-1]:
        call()[1].wait()
    return calls[-1]()


@implements(c10d.scatter_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    (output,), inputs, *rest = args
    pieces = [_parts(piece) for piece in inputs[0]] if inputs else []
    calls = [
        partial(func, [part], [[p[i] for p in pieces]] if inputs else [], *rest)
        for i, part in enumerate(_parts(output))
    ]
    return [output], _in_turn(calls)[1]


@implements(c10d.broadcast_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    (tensor,), *rest = args
    tensor.refuse_if_flat()
    calls = [partial(func, [part], *rest) for part in _parts(tensor)]
    return [tensor], _in_turn(calls)[1]
