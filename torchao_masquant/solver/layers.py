# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the linears that share one input."""

from typing import Mapping, Optional, Sequence

import torch

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.compensation import (
    low_rank_pair,
    resolve_rank,
    smoothed,
    whitening,
)
from torchao_masquant.solver.gauge import gauge
from torchao_masquant.solver.judge import mean_log_error
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.solver.shared_weight import (
    SharedWeight,
    round_jointly,
    round_to_nearest,
)
from torchao_masquant.solver.smoothing import smoothing_factor
from torchao_masquant.tensor_subclasses import low_rank_dtype, quantize_low_rank_pair

__all__ = ["solve_group"]

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
) -> dict[str, LayerRecipe]:
    """All that quantizes the linears that share one input.

    Args:
        weights: name to (N_i, K) floating point weight.
        statistics: of the shared input.
        options: scheme, method, alpha and rank.
        ranks: name to the rank of modality 1, 2, ..., in place of the options'.

    Returns:
        Name to the layer's part of a recipe, on the CPU.

    Raises:
        ValueError: a weight holds nan or inf.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: its weight holds nan or inf.")
    if not options.parts.per_modality:
        return _shared_factor(weights, statistics, options)
    # They serve every exponent, gauge and rounding: see solver.compensation.whitening.
    covariances = [m.covariance(options.parts.centered) for m in statistics.moments]
    wide = any(weight.shape[0] > weight.shape[1] for weight in weights.values())
    whitenings = [whitening(c) if wide else None for c in covariances[1:]]
    alphas, separations = options.alphas, options.separations
    tried: list[tuple[float, float, float, dict[str, LayerRecipe]]] = []

    def attempt(alpha: float, separation: float) -> None:
        layers = _PerModality(
            weights,
            statistics,
            options,
            alpha,
            separation,
            ranks,
            covariances,
            whitenings,
        ).solve()
        error = 0.0
        if len(alphas) + len(separations) > 2:
            error = mean_log_error(weights, layers, statistics, options)
        tried.append((error, alpha, separation, layers))

    for alpha in alphas:
        attempt(alpha, separations[0])
    # min takes the first of equals: the modality's own range, the smaller exponent.
    best_alpha = min(tried, key=lambda t: t[0])[1]
    for separation in separations[1:]:
        attempt(best_alpha, separation)
    return min(tried, key=lambda t: t[0])[3]


class _PerModality:
    """MAS and CMC: a smoothing factor, a gauge, a shift and a pair per modality."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        statistics: InputStatistics,
        options: SolverOptions,
        alpha: float,
        separation: float,
        ranks: Optional[Mapping[str, Sequence[int]]],
        covariances: Sequence[torch.Tensor],
        whitenings: Sequence[Optional[_Pair]],
    ):
        self.covariances, self.whitenings = covariances, whitenings
        self.weights, self.options, self.method = weights, options, options.parts
        self.moments = statistics.moments
        self.importances = options.weights_of(statistics.modalities)
        self.ranks = ranks or {
            name: [resolve_rank(options.uniform_rank, *w.shape)]
            * (len(self.moments) - 1)
            for name, w in weights.items()
        }
        self.means = [m.mean() for m in self.moments]
        self.shifts = [
            mean if self.method.shift else torch.zeros_like(mean) for mean in self.means
        ]
        weight_absmax = _weight_absmax(weights)
        ranges = [
            torch.maximum(m.absmax(shift), RESOLUTION * m.absmax())
            for m, shift in zip(self.moments, self.shifts)
        ]
        unified = torch.stack(ranges).amax(0)
        if options.bits.weight_only:
            # Activations that are not rounded gain nothing from a factor of their own.
            separation = 0.0
        ranges = [r**separation * unified ** (1 - separation) for r in ranges]
        self.factors = [smoothing_factor(r, weight_absmax, alpha) for r in ranges]
        self.pairs: dict[str, list[Optional[_Pair]]] = {}

    def solve(self) -> dict[str, LayerRecipe]:
        shared = self._round(None)
        if self.method.clip:
            # What a modality's error weighs depends on its gauge.
            self._fit_gauges({name: s.dequantize() for name, s in shared.items()})
            shared = self._round(self._importance())
        self._compensate(shared)
        if self.method.rounding == "gptq":
            for name, weight in self.weights.items():
                shared[name] = round_jointly(
                    weight,
                    self.factors,
                    self.pairs[name],
                    self.covariances,
                    self.importances,
                    shared[name],
                    self.options.bits,
                )
            self._compensate(shared)
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
        for importance, factor, covariance in zip(
            self.importances, self.factors, self.covariances
        ):
            energy = sum(
                ((w.double() @ covariance) * w).sum() for w in self.weights.values()
            )
            if energy > 0:
                total += importance / energy * covariance.diagonal() / factor**2
        return total if total.any() else torch.ones_like(total)

    def _fit_gauges(self, values: dict[str, torch.Tensor]) -> None:
        if not self.method.gauge:
            return
        for index in range(1, len(self.moments)):
            self.factors[index] = self.factors[index] / gauge(
                list(self.weights.values()),
                list(values.values()),
                self.factors[index],
                self.covariances[index],
            )

    def _compensate(self, shared: dict[str, SharedWeight]) -> None:
        """Gauge and pairs for these integers."""
        values = {name: s.dequantize() for name, s in shared.items()}
        self._fit_gauges(values)
        self.pairs = {name: [None] for name in self.weights}
        for index in range(1, len(self.moments)):
            covariance = self.covariances[index]
            factor = self.factors[index]
            met = covariance / torch.outer(factor, factor)
            whitened = self.whitenings[index - 1]
            if whitened is not None:
                whitened = smoothed(whitened, factor)
            for name, weight in self.weights.items():
                difference = weight.double() * factor - values[name]
                pair = low_rank_pair(
                    difference, self.ranks[name][index - 1], met, whitened
                )
                self.pairs[name].append(self._held(pair, weight.dtype))

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
            met = values
            if pair is not None:
                met = met + (pair[0].double() @ pair[1].double()).t()
            biases.append(weight @ mean - met @ ((mean - shift) / factor))
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


def _weight_absmax(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    maxima = [weight.abs().amax(0).double() for weight in weights.values()]
    return torch.stack(maxima).amax(0)


def _shared_factor(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """One factor for all tokens, whatever their modality."""
    absmax = torch.stack([m.absmax() for m in statistics.moments]).amax(0)
    factor = torch.ones_like(absmax)
    if options.parts.smooth:
        factor = smoothing_factor(absmax, _weight_absmax(weights), options.alphas[0])
    return {
        name: LayerRecipe(
            shape=(weight.shape[0], weight.shape[1]),
            fingerprint=weight_fingerprint(weight),
            smoothing_factor=factor.float()[None].cpu(),
        )
        for name, weight in weights.items()
    }
