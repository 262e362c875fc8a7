# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``budget="4.5 bits"``: a format and ranks for each input, for the least error."""

import dataclasses
from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

import torch

from torchao_masquant.budget import budget_bytes, formats
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import AUTO_SHARE, SolverOptions, resolve_rank
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.solver.compensation import error_spectrum
from torchao_masquant.solver.judge import token_errors
from torchao_masquant.solver.knapsack import best_choices
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.threads import threads_for

__all__ = ["Choice", "spend_budget"]

# Choices of ranks of one format; more of them tell nothing.
_STEPS = 24


@dataclass(frozen=True)
class Choice:
    """How the linears that share an input are quantized.

    Attributes:
        options: with a scheme and a group size of their own, without a budget.
        ranks: name of each linear to the rank of modality 1, 2, ...
        cost: in bytes.
        damage: what the knapsack keeps small.
    """

    options: SolverOptions
    ranks: Mapping[str, Sequence[int]]
    cost: int
    damage: float

    def solve(
        self,
        weights: dict[str, torch.Tensor],
        statistics: InputStatistics,
        *,
        spend_statistics: bool = False,
    ) -> dict[str, LayerRecipe]:
        """See :func:`solve_group`; each layer says its scheme."""
        layers = solve_group(
            weights,
            statistics,
            self.options,
            self.ranks,
            spend_statistics=spend_statistics,
        )
        for layer in layers.values():
            layer.scheme = self.options.scheme
        return layers


def spend_budget(
    groups: Sequence[tuple[dict[str, torch.Tensor], InputStatistics]],
    options: SolverOptions,
    *,
    progress: bool = False,
) -> list[Choice]:
    """A choice for each input, for the bytes of the budget.

    Every input is solved in each format that there is, without pairs. A choice's damage
    is :attr:`~torchao_masquant.solver.judge.TokenErrors.relative`, summed over linears and
    modalities. Where ranks are to be chosen, pairs
    take components off it as for ``rank="auto"``. Choices are then made for all inputs
    together.

    Args:
        groups: name to weight (N_i, K) of linears that share an input, and its
            statistics.
        options: with a budget.
        progress: show a bar on a terminal.

    Raises:
        ValueError: the budget is below what the smallest choices take.
    """
    places: list[list[Choice]] = []
    for weights, statistics in progress_bar(groups, desc="Choosing", show=progress):
        k = next(iter(weights.values())).shape[1]
        places.append(
            [
                choice
                for one in formats(options, k)
                for choice in _of_format(weights, statistics, one)
            ]
        )
    total = sum(w.numel() for weights, _ in groups for w in weights.values())
    chosen = best_choices(
        [[(choice.cost, choice.damage) for choice in place] for place in places],
        budget_bytes(options, total),
    )
    return [place[index] for place, index in zip(places, chosen)]


@torch.no_grad()
def _of_format(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> Iterator[Choice]:
    """Those that have the same integers, from no pairs to the largest."""
    chooses = options.rank == AUTO
    others = len(statistics.moments) - 1
    solved = dataclasses.replace(options, rank=0) if chooses else options
    layers = solve_group(weights, statistics, solved)
    ranks = {name: list(layer.ranks) or [0] * others for name, layer in layers.items()}
    damage = 0.0
    #: What a component takes off the damage, for each byte, its place, and its energy.
    components: list[tuple[float, str, int, float]] = []
    for name, weight in weights.items():
        quantized = layers[name].quantize(
            weight, options.number_format, statistics.modalities, options.low_rank_bits
        )
        most = resolve_rank(AUTO_SHARE, *weight.shape) if chooses else 0
        for index, importance in enumerate(options.weights_of(statistics.modalities)):
            found = token_errors(weight, quantized, statistics, index)
            if found is None or importance <= 0:
                continue
            damage += importance * found.relative
            if not most or not index:
                continue
            values = _spectrum(weight, quantized, statistics, index)
            tokens = len(statistics.moments[index].sample)
            # The spectrum is of all tokens, the error of some: a pair leaves none below zero.
            scale = min(tokens, found.error / max(values.sum().item(), 1e-300))
            # As large a part of the damage as of the squared error.
            scale *= importance * found.relative / max(found.error, 1e-300)
            for value in values[:most].tolist():
                components.append(
                    (scale * value / sum(weight.shape), name, index, scale * value)
                )
    cost = _cost(layers, ranks, statistics, options)
    yield Choice(solved, {n: tuple(r) for n, r in ranks.items()}, cost, damage)
    components.sort(key=lambda component: -component[0])
    stops = {round(len(components) * step / _STEPS) for step in range(1, _STEPS + 1)}
    for count, (_, name, index, gain) in enumerate(components, start=1):
        ranks[name][index - 1] += 1
        damage -= gain
        if count in stops:
            cost = _cost(layers, ranks, statistics, options)
            yield Choice(solved, {n: tuple(r) for n, r in ranks.items()}, cost, damage)


def _cost(
    layers: Mapping[str, LayerRecipe],
    ranks: Mapping[str, Sequence[int]],
    statistics: InputStatistics,
    options: SolverOptions,
) -> int:
    """Bytes of all that is stored."""
    total = 0
    for name, layer in layers.items():
        layout = layer.layout(
            options.number_format, len(statistics.modalities), options.low_rank_bits
        )
        total += dataclasses.replace(layout, rank=sum(ranks[name])).nbytes
    return total


def _spectrum(
    weight: torch.Tensor,
    quantized: MASQuantTensor,
    statistics: InputStatistics,
    index: int,
) -> torch.Tensor:
    """What each component of a pair would take off a modality's mean squared error."""
    met = quantized.dequantize(torch.float32, statistics.modalities[index]).double()
    with threads_for(max(weight.shape)):
        covariance = statistics.moments[index].covariance()
        return error_spectrum(weight.double() - met, covariance)
