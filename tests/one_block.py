# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model of one block of two linears, to be learned without any decoder around it."""

import torch
from torch import nn


class Block(nn.Module):
    """Two linears and a skip connection."""

    def __init__(self, width: int, inner: int, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """With that block in its one stack."""

    def __init__(self, width: int, inner: int, bias: bool = True):
        super().__init__()
        self.layers = nn.ModuleList([Block(width, inner, bias)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)
