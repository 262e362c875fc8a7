# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The control: SmoothQuant and one low-rank pair that all tokens share."""

from typing import Optional, Union

import torch
from torch import nn

from torchao_masquant.options import Scheme, resolve_rank
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.solver.compensation import low_rank_pair
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["ControlLinear"]


class ControlLinear(nn.Module):
    """SVDQuant's idea (arXiv 2411.05007): the pair repairs the rounding of the weight.

    The pair is the best one for the tokens of all modalities together, centred, with a
    bias for the mean of what it leaves. Weights are rounded to nearest; see ``pooled`` for
    all that ours does, without the modalities.

    Args:
        linear: (N, K) in high precision.
        layer: SmoothQuant's solution for it.
        statistics: of its input.
        bits: integer formats.
        rank: of the pair.
    """

    def __init__(
        self,
        linear: nn.Linear,
        layer: LayerRecipe,
        statistics: InputStatistics,
        bits: Scheme,
        rank: Union[int, float],
    ):
        super().__init__()
        self.bias = linear.bias
        weight, factor = linear.weight.data, layer.smoothing_factor[0].double()
        count = sum(m.count for m in statistics.moments)
        mean = sum(m.sum for m in statistics.moments) / count
        second = sum(m.outer for m in statistics.moments if m.outer is not None) / count
        covariance = (second - torch.outer(mean, mean)) / torch.outer(factor, factor)
        plain = layer.quantize(weight, bits, ("text",))
        difference = weight.double() * factor - (
            plain.dequantize(torch.float32).double() * factor
        )
        pair = low_rank_pair(difference, resolve_rank(rank, *weight.shape), covariance)
        l1, l2 = (None, None) if pair is None else (t.bfloat16() for t in pair)
        left = difference
        if l1 is not None:
            left = left - (l1.double() @ l2.double()).t()
        bias = (left @ (mean / factor)).float()
        # The tensor has pairs for modalities beside the base: all tokens are of one.
        self.weight = MASQuantTensor.from_hp(
            weight,
            weight_bits=bits.weight_bits,
            act_bits=bits.act_bits,
            group_size=bits.group_size,
            symmetric=bits.symmetric,
            modalities=("none", "all"),
            smoothing_factor=layer.smoothing_factor.expand(2, -1),
            ranks=() if l1 is None else (l1.shape[1],),
            l1=l1,
            l2=l2,
            modality_bias=torch.stack((torch.zeros_like(bias), bias)),
        )

    @property
    def nbytes_stored(self) -> int:
        """Bytes of weight, pair and one factor and bias."""
        n, k = self.weight.shape
        return self.weight.nbytes_stored - 4 * (n + k)

    def routed(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        """(..., K) to (..., N)."""
        ones = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return torch.ops.masquant.linear(x, self.weight, ones, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.routed(x, None)
