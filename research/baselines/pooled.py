# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Everything that method "masquant" does, but for the modalities."""

import dataclasses
from typing import Any, Optional

import torch
from torch import nn

from torchao_masquant.options import Scheme, SolverOptions, resolve_rank
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics, Moments
from torchao_masquant.statistics.token_sample import TokenSample

__all__ = ["PooledLinear", "pooled", "pooled_statistics"]

# The tensor has pairs for modalities beside the base: all tokens are of that one.
_NAMES = ("none", "all")


def pooled_statistics(statistics: InputStatistics) -> InputStatistics:
    """The statistics that there would be if all tokens were of one modality.

    Args:
        statistics: with second moments.

    Returns:
        Those of two modalities with the same tokens: see :func:`pooled`.
    """
    seen = statistics.moments
    outers = [m.outer for m in seen if m.outer is not None]
    together = Moments(
        count=sum(m.count for m in seen),
        amin=torch.stack([m.amin for m in seen]).amin(0),
        amax=torch.stack([m.amax for m in seen]).amax(0),
        sum=torch.stack([m.sum for m in seen]).sum(0),
        outer=torch.stack(outers).sum(0),
        sampled=_sample(seen),
    )
    width = together.sum.shape[0]
    found = InputStatistics(width, _NAMES, together.sum.device, second_moments=False)
    found.moments = [together, together]
    return found


def _sample(seen: list[Moments]) -> TokenSample:
    """Sampled tokens in the proportion of all of them, which differs from the samples'."""
    share = min(m.sample.shape[0] / m.count for m in seen if m.count)
    kept = []
    for moments in seen:
        have = moments.sample.shape[0]
        want = round(share * moments.count)
        kept.append(moments.sample[torch.linspace(0, have - 1, want).round().long()])
    rows = torch.cat(kept)
    return TokenSample(rows, torch.arange(len(rows)))


def pooled(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """Solve for all tokens together: factor, shift, clip, GPTQ, pair and bias.

    What this lacks of ours is what modalities give. Its one pair has the rank, and so
    the bytes, of ours together.

    Args:
        weights: name to (N_i, K) of linears that share their input.
        statistics: of that input, per modality.
        options: of "masquant"; the rank is that of each of its pairs.
    """
    pairs = len(statistics.moments) - 1
    ranks = {
        name: [min(pairs * resolve_rank(options.uniform_rank, *w.shape), *w.shape)]
        for name, w in weights.items()
    }
    # No token is of the base, so its error weighs nothing.
    alone = dataclasses.replace(options, modality_weights={"none": 0.0, "all": 1.0})
    return solve_group(weights, pooled_statistics(statistics), alone, ranks)


class PooledLinear(nn.Module):
    """A linear that treats all tokens as the modality that :func:`pooled` solved for.

    Args:
        linear: (N, K) in high precision.
        layer: solution for it.
        bits: integer formats.
    """

    def __init__(self, linear: nn.Linear, layer: LayerRecipe, bits: Scheme):
        super().__init__()
        self.bias = linear.bias
        self.weight: Any = layer.quantize(linear.weight.data, bits, _NAMES)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of weight and pair, and of one factor, shift and bias."""
        weight = self.weight
        parts = (weight.act_pre_scale, weight.act_shift, weight.modality_bias)
        return weight.nbytes_stored - sum(p[0].nbytes for p in parts if p is not None)

    def routed(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        """(..., K) to (..., N), whatever the ids."""
        ones = torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return torch.ops.masquant.linear(x, self.weight, ones, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.routed(x, None)
