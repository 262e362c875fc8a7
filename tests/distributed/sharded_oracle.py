# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a sharded linear must compute, from the whole linear on one process."""

import torch
from linear_oracle import expected
from torch import nn

from torchao_masquant import MASQuantLinear, MASQuantTensor


def columns_of(linear: MASQuantLinear, rank: int, ranks: int) -> MASQuantLinear:
    """A linear of one rank's input channels; the first rank has the bias."""
    width = linear.in_features // ranks
    weight = linear.weight.data[:, rank * width : (rank + 1) * width]
    assert isinstance(weight, MASQuantTensor)
    part = nn.Linear(width, linear.out_features, bias=False)
    part = MASQuantLinear.from_float(part, weight, linear.fqn, linear.router)
    if rank == 0:
        part.bias = linear.bias
    return part


class SplitByColumns(nn.Module):
    """What row-wise parallel linears do, one rank after the other in one process."""

    def __init__(self, linear: MASQuantLinear, ranks: int):
        super().__init__()
        self.parts = nn.ModuleList(columns_of(linear, r, ranks) for r in range(ranks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.chunk(len(self.parts), -1)
        return sum(part(piece) for part, piece in zip(self.parts, pieces))


def split_by_columns(model: nn.Module, ranks: int) -> None:
    """Put it in the place of a decoder's o_proj and down_proj."""
    for module in list(model.modules()):
        for name in ("o_proj", "down_proj"):
            linear = getattr(module, name, None)
            if isinstance(linear, MASQuantLinear):
                setattr(module, name, SplitByColumns(linear, ranks))


def expected_sum(
    linear: MASQuantLinear, x: torch.Tensor, ids: torch.Tensor, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a linear sharded by columns in float64, and a bound of its error."""
    pieces = x.chunk(ranks, -1)
    parts = [
        expected(columns_of(linear, r, ranks), piece, ids)
        for r, piece in enumerate(pieces)
    ]
    return sum(y for y, _ in parts), sum(bound for _, bound in parts)
