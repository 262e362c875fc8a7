# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the linears that share one input."""

from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.compensation import (
    low_rank_pair,
    pair_of_product,
    smoothed,
    whitening,
)
from torchao_masquant.solver.gauge import fitted_gauge
from torchao_masquant.solver.judge import mean_log_error
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.solver.products import HELD_BYTES, Products
from torchao_masquant.solver.sampled_outputs import sampled_outputs, sampled_rank
from torchao_masquant.solver.shared_weight import (
    SharedWeight,
    round_jointly,
    round_to_nearest,
)
from torchao_masquant.solver.smoothing import smoothing_factor
from torchao_masquant.tensor_subclasses import low_rank_dtype, quantize_low_rank_pair
from torchao_masquant.threads import threads_for, widest

__all__ = ["factors_alone", "solve_group"]

# Of the range of a channel: a bfloat16 activation is known to no better than this, so
# that what a shift leaves of a constant is not smoothed as if it were a signal.
RESOLUTION = 2.0**-8

_Pair = tuple[torch.Tensor, torch.Tensor]


@torch.inference_mode(False)
@torch.no_grad()
def solve_group(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
    ranks: Optional[Mapping[str, Sequence[int]]] = None,
    *,
    factors: Optional[Mapping[str, torch.Tensor]] = None,
    spend_statistics: bool = False,
) -> dict[str, LayerRecipe]:
    """All that quantizes the linears that share one input.

    Where exponent and separation are to be chosen, that is done for some of the outputs
    of wide linears (:func:`sampled_outputs`); the choice then serves all.

    Args:
        weights: name to (N_i, K) floating point weight.
        statistics: of the shared input.
        options: scheme, method, alpha and rank.
        ranks: name to the rank of modality 1, 2, ..., in place of the options'.
        factors: name to smoothing factors (M, K) to solve the rest for, of which each
            linear has its own.
        spend_statistics: use their memory, 8 K^2 bytes a modality, for covariances; they
            have no second moments afterwards.

    Returns:
        Name to the layer's part of a recipe, on the CPU.

    Raises:
        ValueError: a weight holds nan or inf.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: its weight holds nan or inf.")
    with threads_for(widest(weights.values())):
        spared = {n: w for n, w in weights.items() if options.spares(n)}
        others = {n: w for n, w in weights.items() if n not in spared}
        layers = {name: _with_factor(w) for name, w in spared.items()}
        if others and not options.parts.per_modality:
            layers |= _shared_factor(others, statistics, options)
        elif others:
            if ranks is None:
                ranks = _uniform_ranks(others, len(statistics.moments) - 1, options)
            covariances = [
                m.covariance(options.parts.centered, spend=spend_statistics)
                for m in statistics.moments
            ]
            if factors is None:
                layers |= _chosen(others, statistics, options, ranks, covariances)
            else:
                for name, weight in others.items():
                    problem = _Problem(
                        {name: weight},
                        ranks,
                        weight.abs().amax(0).double(),
                        statistics,
                        options,
                        covariances,
                    )
                    layers |= problem.solve_for(factors[name])
        return {name: layers[name] for name in weights}


def _uniform_ranks(
    weights: dict[str, torch.Tensor], pairs: int, options: SolverOptions
) -> dict[str, list[int]]:
    return {
        name: [options.rank_of(options.uniform_rank, *w.shape)] * pairs
        for name, w in weights.items()
    }


def _chosen(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
    ranks: Mapping[str, Sequence[int]],
    covariances: Sequence[torch.Tensor],
) -> dict[str, LayerRecipe]:
    """Of exponents and separations the best, tried on some of the outputs of wide ones."""
    absmax = _weight_absmax(weights)
    alphas, separations = options.alphas, options.separations
    if len(alphas) + len(separations) == 2:
        problem = _Problem(weights, ranks, absmax, statistics, options, covariances)
        return problem.solve(alphas[0], separations[0])
    some = sampled_outputs(weights)
    some_ranks = {
        name: [sampled_rank(r, weights[name].shape, w.shape) for r in ranks[name]]
        for name, w in some.items()
    }
    problem = _Problem(some, some_ranks, absmax, statistics, options, covariances)
    least, best = float("inf"), (alphas[0], separations[0])
    layers: dict[str, LayerRecipe] = {}

    def attempt(alpha: float, separation: float) -> None:
        nonlocal least, best, layers
        found = problem.solve(alpha, separation)
        error = mean_log_error(some, found, statistics, options)
        # The first of equals is kept: the modality's own range, the smaller exponent.
        if not layers or error < least:
            least, best, layers = error, (alpha, separation), found

    for alpha in alphas:
        attempt(alpha, separations[0])
    best_alpha = best[0]
    for separation in separations[1:]:
        attempt(best_alpha, separation)
    if all(some[name].shape == weight.shape for name, weight in weights.items()):
        return layers
    del problem, layers
    problem = _Problem(weights, ranks, absmax, statistics, options, covariances)
    return problem.solve(*best)


class _Problem:
    """Linears that share an input, and what serves every exponent and separation.

    Args:
        weights: name to (N_i, K).
        ranks: name to the rank of modality 1, 2, ...
        weight_absmax: (K,) float64, of these and, where they are a sample, of all.
        statistics: of the input.
        options: of the solution.
        covariances: (K, K) float64 of each modality, as the method has them.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        ranks: Mapping[str, Sequence[int]],
        weight_absmax: torch.Tensor,
        statistics: InputStatistics,
        options: SolverOptions,
        covariances: Sequence[torch.Tensor],
    ):
        self.weights, self.ranks, self.weight_absmax = weights, ranks, weight_absmax
        self.moments, self.options = statistics.moments, options
        self.importances = options.weights_of(statistics.modalities)
        self.covariances = covariances
        self.products = Products(weights, covariances)
        self._whitenings: dict[int, _Pair] = {}

    def whitening(self, modality: int) -> _Pair:
        """Of the unsmoothed input: see :func:`solver.compensation.whitening`."""
        if modality not in self._whitenings:
            self._whitenings[modality] = whitening(self.covariances[modality])
        return self._whitenings[modality]

    def solve(self, alpha: float, separation: float) -> dict[str, LayerRecipe]:
        return _PerModality(self, alpha, separation).solve()

    def solve_for(self, factors: torch.Tensor) -> dict[str, LayerRecipe]:
        """Without gauge and clip, which would move the factors (M, K)."""
        solution = _PerModality(self, self.options.alphas[0], 1.0)
        solution.factors = list(factors.to(self.weight_absmax.device, torch.float64))
        return solution.solve()


class _PerModality:
    """MAS and CMC: a smoothing factor, a gauge, a shift and a pair per modality."""

    def __init__(self, problem: _Problem, alpha: float, separation: float):
        self.problem, self.weights = problem, problem.weights
        self.options, self.method = problem.options, problem.options.parts
        self.moments, self.covariances = problem.moments, problem.covariances
        self.means = [m.mean() for m in self.moments]
        self.shifts = [
            mean if self.method.shift else torch.zeros_like(mean) for mean in self.means
        ]
        self.factors = _factors(
            [m.absmax(shift) for m, shift in zip(self.moments, self.shifts)],
            [m.absmax() for m in self.moments],
            problem.weight_absmax,
            alpha,
            separation,
            self.options.bits.weight_only,
        )
        self.pairs: dict[str, list[Optional[_Pair]]] = {}

    def solve(self) -> dict[str, LayerRecipe]:
        shared = self._round(None)
        if self.method.clip:
            # What a modality's error weighs depends on its gauge.
            self._fit(shared, with_pairs=False)
            shared = self._round(self._importance())
        self._fit(shared)
        if self.method.rounding == "gptq":
            for name, weight in self.weights.items():
                shared[name] = round_jointly(
                    weight,
                    self.factors,
                    self.pairs[name],
                    self.covariances,
                    self.problem.importances,
                    shared[name],
                    self.options.bits,
                    [
                        self.problem.products.of(name, i)
                        for i in range(len(self.moments))
                    ],
                )
            self._fit(shared)
        return {name: self._layer(name, shared[name]) for name in self.weights}

    def _round(self, importance: Optional[torch.Tensor]) -> dict[str, SharedWeight]:
        return {
            name: round_to_nearest(
                weight, self.factors[0], self.options.bits, importance
            )
            for name, weight in self.weights.items()
        }

    def _importance(self) -> torch.Tensor:
        """(K,) how much an error of each input channel weighs, to clip by."""
        total = torch.zeros_like(self.factors[0])
        for index, (importance, factor, covariance) in enumerate(
            zip(self.problem.importances, self.factors, self.covariances)
        ):
            energy = sum(self.problem.products.energy(n, index) for n in self.weights)
            if energy > 0:
                total += importance / energy * covariance.diagonal() / factor**2
        return total if total.any() else torch.ones_like(total)

    def _fit(self, shared: dict[str, SharedWeight], *, with_pairs: bool = True) -> None:
        """Gauges, and pairs, for these integers."""
        self.pairs = {name: [None] for name in self.weights}
        for index in range(1, len(self.moments)):
            differences: Iterable[tuple[str, torch.Tensor, torch.Tensor]]
            differences = _Differences(self, shared, index)
            if 16 * sum(w.numel() for w in self.weights.values()) <= HELD_BYTES:
                differences = list(differences)
            g = 1.0
            if self.method.gauge:
                g = fitted_gauge(
                    (
                        self.problem.products.energy(name, index).item(),
                        (product * self.weights[name]).sum().item(),
                        (product * difference).sum().item(),
                    )
                    for name, difference, product in differences
                )
                self.factors[index] = self.factors[index] / g
            if not with_pairs:
                continue
            for name, difference, product in differences:
                if g != 1.0:
                    # W - g V from W - V.
                    weight = self.weights[name].double()
                    known = self.problem.products.of(name, index)
                    difference = g * difference + (1 - g) * weight
                    product = g * product + (1 - g) * known
                self.pairs[name].append(self._pair(name, index, difference, product))

    def _pair(
        self, name: str, index: int, difference: torch.Tensor, product: torch.Tensor
    ) -> Optional[_Pair]:
        """For ``W - V / s`` and what it gives of the covariance."""
        rank, factor = self.problem.ranks[name][index - 1], self.factors[index]
        if rank == 0:
            return None
        n, k = difference.shape
        if n <= k:
            pair = pair_of_product(difference * factor, rank, product / factor)
        else:
            pair = low_rank_pair(
                difference * factor,
                rank,
                self.covariances[index],
                smoothed(self.problem.whitening(index), factor),
            )
        return self._held(pair, self.weights[name].dtype)

    def _held(self, pair: Optional[_Pair], dtype: torch.dtype) -> Optional[_Pair]:
        """The pair as the model will hold it: what comes after makes up for that."""
        if pair is None:
            return None
        if self.options.low_rank_bits == 8:
            l1, l2, scale = quantize_low_rank_pair(*pair)
            return l1.float() * scale, l2.float()
        held = low_rank_dtype(dtype)
        return pair[0].to(held), pair[1].to(held)

    def _layer(self, name: str, shared: SharedWeight) -> LayerRecipe:
        weight, pairs = self.weights[name].double(), self.pairs[name]
        values = shared.dequantize()
        biases = []
        for factor, shift, mean, pair in zip(
            self.factors, self.shifts, self.means, pairs
        ):
            unshifted = (mean - shift) / factor
            met = values @ unshifted
            if pair is not None:
                met = met + (unshifted @ pair[0].double()) @ pair[1].double()
            biases.append(weight @ mean - met)
        found = [pair for pair in pairs if pair is not None]
        ready = self.method.rounding == "gptq" or self.method.clip
        return LayerRecipe(
            shape=(weight.shape[0], weight.shape[1]),
            fingerprint=weight_fingerprint(self.weights[name]),
            smoothing_factor=torch.stack(self.factors).float().cpu(),
            ranks=tuple(0 if p is None else p[0].shape[1] for p in pairs[1:])
            if found
            else (),
            l1=torch.cat([l1 for l1, _ in found], dim=1).cpu() if found else None,
            l2=torch.cat([l2 for _, l2 in found], dim=0).cpu() if found else None,
            modality_bias=torch.stack(biases).float().cpu()
            if self.method.centered
            else None,
            act_shift=torch.stack(
                [shift / factor for shift, factor in zip(self.shifts, self.factors)]
            )
            .float()
            .cpu()
            if self.method.shift
            else None,
            qdata=shared.qdata.cpu() if ready else None,
            scale=shared.scale.cpu() if ready else None,
            zero_point=shared.zero_point.cpu()
            if ready and shared.zero_point is not None
            else None,
        )


class _Differences:
    """Name, ``W - V / s`` and ``(W - V / s) C`` of linear after linear, made anew."""

    def __init__(
        self, solution: _PerModality, shared: dict[str, SharedWeight], index: int
    ):
        self.weights, self.shared = solution.weights, shared
        self.factor = solution.factors[index]
        self.covariance = solution.covariances[index]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name, weight in self.weights.items():
            met = self.shared[name].dequantize() / self.factor
            difference = weight.double() - met
            yield name, difference, difference @ self.covariance


@torch.inference_mode(False)
@torch.no_grad()
def factors_alone(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """What is learned where ``options.learns_factors``: no integers, no pairs.

    Args:
        weights: name to (N_i, K) of linears that share an input.
        statistics: of the input; second moments are not needed.
        options: of the solution.

    Returns:
        Name to a part of a recipe with factors (M, K), or (1, K) of ones for what the
        method spares.
    """
    ranges = [m.absmax() for m in statistics.moments]
    absmax = _weight_absmax(weights)
    factors = torch.stack(
        _factors(
            ranges,
            ranges,
            absmax,
            options.alphas[0],
            options.separations[0],
            options.bits.weight_only,
        )
    )
    found = {}
    for name, weight in weights.items():
        found[name] = _with_factor(weight)
        if not options.spares(name):
            found[name].smoothing_factor = factors.float().cpu()
    return found


def _factors(
    ranges: Sequence[torch.Tensor],
    unshifted: Sequence[torch.Tensor],
    weight_absmax: torch.Tensor,
    alpha: float,
    separation: float,
    weight_only: bool,
) -> list[torch.Tensor]:
    """(K,) float64 of each modality, in closed form.

    Args:
        ranges: (K,) of each modality's channels, about the shift.
        unshifted: of the same, about zero.
        weight_absmax: (K,) of all weights that share the input.
        alpha: exponent of the activations.
        separation: of the modality's own range from that of all; none where activations
            are not rounded, which gain nothing from a factor of their own.
        weight_only: whether that is so.
    """
    separation = 0.0 if weight_only else separation
    ranges = [torch.maximum(r, RESOLUTION * u) for r, u in zip(ranges, unshifted)]
    unified = torch.stack(ranges).amax(0)
    return [
        smoothing_factor(
            r**separation * unified ** (1 - separation), weight_absmax, alpha
        )
        for r in ranges
    ]


def _weight_absmax(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    maxima = [weight.abs().amax(0).double() for weight in weights.values()]
    return torch.stack(maxima).amax(0)


def _shared_factor(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """One factor for all tokens, whatever their modality."""
    factor = None
    if options.parts.smooth:
        absmax = torch.stack([m.absmax() for m in statistics.moments]).amax(0)
        factor = smoothing_factor(absmax, _weight_absmax(weights), options.alphas[0])
    return {name: _with_factor(weight, factor) for name, weight in weights.items()}


def _with_factor(
    weight: torch.Tensor, factor: Optional[torch.Tensor] = None
) -> LayerRecipe:
    """Rounded with one factor (K,) for all tokens; None: as it is."""
    factor = torch.ones(weight.shape[1]) if factor is None else factor
    return LayerRecipe(
        shape=(weight.shape[0], weight.shape[1]),
        fingerprint=weight_fingerprint(weight),
        smoothing_factor=factor.float()[None].cpu(),
    )
