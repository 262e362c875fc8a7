# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MASQuant as its authors run it, simulated: pairs read activations that are not rounded."""

import dataclasses
from typing import Any, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.options import Scheme
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router

__all__ = ["PublishedLinear"]


class PublishedLinear(nn.Module):
    """A linear whose pairs are fed ``x / s``, where what is deployed feeds ``Q(x / s)``.

    Args:
        name: of the linear.
        linear: (N, K) in high precision.
        layer: solution of method "masquant-paper" for it.
        bits: integer formats.
        modalities: names, base first.
        router: of the model.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        layer: LayerRecipe,
        bits: Scheme,
        modalities: Sequence[str],
        router: Router,
    ):
        super().__init__()
        self.name, self.router, self.bias = name, router, linear.bias
        self.layer = layer
        bare = dataclasses.replace(layer, ranks=(), l1=None, l2=None)
        self.weight: Any = bare.quantize(linear.weight.data, bits, modalities)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of weight, factors and pairs."""
        pairs = [t for t in (self.layer.l1, self.layer.l2) if t is not None]
        return self.weight.nbytes_stored + sum(t.nbytes for t in pairs)

    def routed(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        """(..., K) to (..., N)."""
        y = torch.ops.masquant.linear(x, self.weight, ids, self.bias)
        if ids is None or self.layer.l1 is None or self.layer.l2 is None:
            return y
        start = 0
        for index, rank in enumerate(self.layer.ranks, start=1):
            own = slice(start, start := start + rank)
            down, up = self.layer.l1[:, own].to(x), self.layer.l2[own].to(x)
            repaired = (x / self.layer.smoothing_factor[index].to(x)) @ down @ up
            y = y + torch.where((ids == index)[..., None], repaired, 0)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = self.router.ids_for(self.name, x)
        return self.routed(x, None if ids is None else ids.reshape(x.shape[:-1]))
