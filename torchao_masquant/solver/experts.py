# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the experts of a mixture."""

import dataclasses

import torch

from torchao_masquant.option_values import AUTO
from torchao_masquant.options import AUTO_SHARE, SolverOptions, resolve_rank
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.smoothing import RESOLUTION
from torchao_masquant.statistics.expert_statistics import ExpertStatistics
from torchao_masquant.statistics.input_statistics import (
    ROUNDING,
    InputStatistics,
    Moments,
)
from torchao_masquant.statistics.token_sample import TokenSample

__all__ = ["recentered", "solve_experts"]


def solve_experts(
    name: str,
    weight: torch.Tensor,
    statistics: InputStatistics,
    options: SolverOptions,
    *,
    spend_statistics: bool = False,
) -> LayerRecipe:
    """All that quantizes one projection of the experts of a layer.

    They are solved for as linears that share an input: one smoothing factor and gauge
    for each modality, integers, pair and biases for each expert, all from the statistics
    of what all experts read. An expert's own tokens may be few, or none.

    Where each expert reads something else (:class:`ExpertStatistics`) a shift is its own,
    too: with its mean off, an expert's tokens are like any other's.

    Args:
        name: of the weight, for messages.
        weight: (E, N, K) floating point.
        statistics: of the tokens that the experts read.
        options: scheme, method, alpha and rank. A rank of "auto" is the same share for
            all experts, since they are held in one tensor.
        spend_statistics: see :func:`solve_group`.

    Returns:
        The part of a recipe, on the CPU.

    Raises:
        ValueError: a weight holds nan or inf.
    """
    experts = {f"{name}[{e}]": of_expert for e, of_expert in enumerate(weight)}
    ranks = None
    if options.procedure.per_modality and options.rank == AUTO:
        share = resolve_rank(AUTO_SHARE, *weight.shape[1:])
        ranks = {key: [share] * (len(statistics.moments) - 1) for key in experts}
    means = None
    if options.procedure.shift and isinstance(statistics, ExpertStatistics):
        statistics, means = recentered(statistics)
        spend_statistics = True
    layers = list(
        solve_group(
            experts, statistics, options, ranks, spend_statistics=spend_statistics
        ).values()
    )
    if means is not None:
        layers = [_moved(*of_one) for of_one in zip(layers, weight, means)]
    return LayerRecipe.stack(layers, weight_fingerprint(weight))


def recentered(
    statistics: ExpertStatistics,
) -> tuple[InputStatistics, torch.Tensor]:
    """Statistics of tokens without the mean of their expert and modality.

    The mean is taken as if the expert had seen one more token, of the mean of all
    experts: one that has seen none has theirs.

    Returns:
        The statistics of all experts' tokens, and the means (E, M, K) float64.
    """
    moved = InputStatistics.__new__(InputStatistics)
    moved.modalities, moved.moments = statistics.modalities, []
    all_means = []
    for moments, own in zip(statistics.moments, statistics.of_experts):
        count = own.count[:, None]
        means = (own.sum + moments.mean()) / (count + 1)
        seen = own.count > 0
        # A bfloat16 activation is known to no better, whatever is taken off it.
        least = RESOLUTION * moments.absmax()
        crossed = own.sum.t() @ means
        outer = None
        if moments.outer is not None:
            outer = moments.outer - crossed - crossed.t() + (means * count).t() @ means
            # A channel that is constant in every expert, to within rounding, does not vary.
            varies = outer.diagonal() > ROUNDING * moments.outer.diagonal()
            outer = outer * torch.outer(varies, varies)
        moved.moments.append(
            Moments(
                moments.count,
                torch.minimum((own.amin - means)[seen].amin(0), -least),
                torch.maximum((own.amax - means)[seen].amax(0), least),
                moments.sum - (means * count).sum(0),
                outer,
                TokenSample(
                    moments.sample - means[own.sampled.rows].float(),
                    moments.sampled.numbers,
                )
                if outer is not None
                else moments.sampled,
            )
        )
        all_means.append(means)
    return moved, torch.stack(all_means, dim=1)


def _moved(
    layer: LayerRecipe, weight: torch.Tensor, means: torch.Tensor
) -> LayerRecipe:
    """The part of one expert for tokens that still have their mean.

    Args:
        layer: for tokens without it.
        weight: (N, K) of the expert.
        means: (M, K) float64.
    """
    assert layer.act_shift is not None and layer.modality_bias is not None
    means = means.cpu()
    shift = layer.act_shift.double() + means / layer.smoothing_factor.double()
    bias = layer.modality_bias.double() + means @ weight.cpu().double().t()
    return dataclasses.replace(
        layer, act_shift=shift.float(), modality_bias=bias.float()
    )
