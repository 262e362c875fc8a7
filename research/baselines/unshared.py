# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MAS without sharing: a quantized weight for each modality. Not deployable; a bound."""

from typing import Optional

import torch
from torch import nn

from torchao_masquant.options import Scheme
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["UnsharedLinear"]


class UnsharedLinear(nn.Module):
    """Each token meets the weight that was smoothed and rounded for its modality.

    Args:
        name: of the linear.
        linear: (N, K) in high precision.
        factors: (M, K) smoothing factor of each modality.
        bits: integer formats.
        router: of the model.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        factors: torch.Tensor,
        bits: Scheme,
        router: Router,
    ):
        super().__init__()
        self.name, self.router, self.bias = name, router, linear.bias
        self.weights = [
            MASQuantTensor.from_hp(
                linear.weight.data,
                weight_bits=bits.weight_bits,
                act_bits=bits.act_bits,
                group_size=bits.group_size,
                symmetric=bits.symmetric,
                smoothing_factor=factor[None],
            )
            for factor in factors
        ]

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all weights."""
        return sum(weight.nbytes_stored for weight in self.weights)

    def routed(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        """(..., K) to (..., N)."""
        if ids is None:
            return torch.ops.masquant.linear(x, self.weights[0], None, self.bias)
        outputs = [
            torch.ops.masquant.linear(x, weight, None, self.bias)
            for weight in self.weights
        ]
        index = ids.clamp_min(0)[None, ..., None].expand(1, *outputs[0].shape)
        return torch.stack(outputs).gather(0, index)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.routed(x, self.router.ids_for(self.name, x))
