# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a layer of vLLM holds of quantized weights, and how it is called.

A layer that vLLM has merged (q, k and v; gate and up) has one weight for each of its shards.
They read one input and nearly always smooth it alike, so that it is smoothed and quantized
once. Shards without low-rank pairs are one weight; ranks of pairs differ.
"""

from typing import Optional, Sequence

import torch
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.linear_operator import (
    product,
    smooth,
    weight_only_product,
)
from torchao_masquant.vllm_plugin.weight_parts import WeightParts

__all__ = ["QuantizedShards"]


class QuantizedShards(nn.Module):
    """One layer's quantized weights, in the order of its outputs.

    Args:
        weights: one of each shard, (N_i, K), of one type.
    """

    def __init__(self, weights: Sequence[MASQuantTensor]):
        super().__init__()
        if len(weights) > 1 and not any(sum(w.ranks) for w in weights):
            weights = _joined(weights)
        self.shards = nn.ModuleList(WeightParts(weight) for weight in weights)
        self.sizes = [weight.shape[0] for weight in weights]
        self.is_routed = any(weight.is_routed for weight in weights)
        self.smooth_alike = all(weights[0].smooths_like(w) for w in weights)

    def forward(
        self,
        x: torch.Tensor,
        ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """The outputs of all shards, side by side.

        Args:
            x: (..., K) floating point.
            ids: (T,) int32 modality ids of its tokens, or None: all are base.
            bias: (N,), of all shards, or None.

        Returns:
            (..., N) of x's type.
        """
        tokens = x.reshape(-1, x.shape[-1])
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        outputs, smoothed = [], None
        for shard, own in zip(self.shards, biases):
            assert isinstance(shard, WeightParts)
            known = ids if shard.is_routed else None
            if shard.act_bits == 16:
                outputs.append(weight_only_product(shard, tokens, known, own, shard))
                continue
            if smoothed is None or not self.smooth_alike:
                smoothed = smooth(shard, tokens, known)
            outputs.append(product(shard, smoothed, known, own, x.dtype))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _joined(weights: Sequence[MASQuantTensor]) -> Sequence[MASQuantTensor]:
    """One weight of several whose rows may stand below each other; else they stay."""
    try:
        joined = torch.cat(list(weights), 0)
    except ValueError:
        return weights
    assert isinstance(joined, MASQuantTensor)
    return [joined]
