# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``rank="auto"``: bytes of low-rank pairs, spent where they gain most."""

import dataclasses
import heapq
import math
from typing import Optional, Sequence

import torch

from torchao_masquant.options import AUTO_SHARE, SolverOptions, resolve_rank
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.solver.compensation import error_spectrum
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.threads import threads_for

__all__ = ["allocate", "spend_ranks"]


def spend_ranks(
    groups: Sequence[tuple[dict[str, torch.Tensor], InputStatistics]],
    options: SolverOptions,
    *,
    progress: bool = False,
) -> dict[str, list[int]]:
    """A rank for each linear and modality, for the bytes of a uniform rank.

    Every input is solved without pairs first. What a pair of rank r would leave of a
    linear's error then is known: the tail of the singular values of the whitened
    difference (theorem 2 of arXiv 2603.04800), and beside it the noise of the rounded
    activations, measured on the sampled tokens, that no pair repairs. The bytes go to
    the components that lower the sum of the logarithms of those errors most per byte:
    a linear whose error is all noise is left without a pair.

    Args:
        groups: name to weight (N_i, K) of linears that share an input, and its
            statistics.
        options: with a rank of "auto".
        progress: show a bar on a terminal.

    Returns:
        Name of a linear to the ranks of modality 1, 2, ...
    """
    bare = dataclasses.replace(options, rank=0)
    budget = 0
    spectra: dict[tuple[str, int], tuple[list[float], float, int]] = {}
    names: dict[str, int] = {}
    bar = progress_bar(groups, desc="Ranking", show=progress)
    for weights, statistics in bar:
        layers = solve_group(weights, statistics, bare)
        for name, weight in weights.items():
            others = len(statistics.moments) - 1
            cost = sum(weight.shape)
            names[name] = others
            budget += others * cost * resolve_rank(AUTO_SHARE, *weight.shape)
            for index, importance in enumerate(
                options.weights_of(statistics.modalities)
            ):
                if index == 0 or importance == 0:
                    continue
                with threads_for(max(weight.shape)):
                    found = _spectrum(weight, layers[name], statistics, index, options)
                if found is not None:
                    spectra[name, index] = (*found, cost)
    ranks = allocate(spectra, budget)
    return {
        name: [ranks.get((name, index), 0) for index in range(1, others + 1)]
        for name, others in names.items()
    }


def allocate(
    spectra: dict[tuple[str, int], tuple[list[float], float, int]], budget: int
) -> dict[tuple[str, int], int]:
    """Take components one by one, the best first, while they fit the budget.

    Args:
        spectra: of each place, the errors that its components would take away, largest
            first, the error that stays in any case, and the cost of a component.
        budget: in units of cost.

    Returns:
        How many components each place gets.
    """
    ranks = dict.fromkeys(spectra, 0)
    left = {key: sum(values) + floor for key, (values, floor, _) in spectra.items()}

    def gain(key: tuple[str, int]) -> float:
        values, _, cost = spectra[key]
        value = values[ranks[key]]
        # ``left`` is a float sum, which rounding may bring below the component itself.
        return math.log(left[key] / max(left[key] - value, 1e-9 * left[key])) / cost

    heap = [
        (-gain(key), key)
        for key, (values, _, _) in spectra.items()
        if values and values[0] > 0
    ]
    heapq.heapify(heap)
    while heap:
        _, key = heapq.heappop(heap)
        values, _, cost = spectra[key]
        if cost > budget:
            continue
        budget -= cost
        left[key] -= values[ranks[key]]
        ranks[key] += 1
        if ranks[key] < len(values) and values[ranks[key]] > 0:
            heapq.heappush(heap, (-gain(key), key))
    return ranks


@torch.no_grad()
def _spectrum(
    weight: torch.Tensor,
    layer: LayerRecipe,
    statistics: InputStatistics,
    index: int,
    options: SolverOptions,
) -> Optional[tuple[list[float], float]]:
    """What components of a pair would take off, and the noise beside that.

    None where the modality does not vary.
    """
    moments = statistics.moments[index]
    weight = weight.double()
    covariance = moments.covariance()
    quantized = layer.quantize(
        weight.float(),
        options.number_format,
        statistics.modalities,
        options.low_rank_bits,
    )
    met = quantized.dequantize(torch.float32, statistics.modalities[index]).double()
    # The spectrum is that of the unsmoothed input and weight: the factor cancels.
    values = error_spectrum(weight - met, covariance)
    if not values.any():
        return None
    tokens = moments.sample
    ids = torch.full((tokens.shape[0],), index, device=tokens.device)
    rounded = torch.ops.masquant.linear(tokens, quantized, ids, None).double()
    error = rounded - tokens.double() @ weight.t()
    noise = error.square().sum(1).mean() - values.sum()
    floor = max(noise.item(), 1e-6 * values.sum().item())
    return values.tolist(), floor
