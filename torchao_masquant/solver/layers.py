# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the linears that share one input."""

from typing import Iterator, Mapping, Optional, Sequence

import torch

from torchao_masquant.options import FAST, SolverOptions
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.compensation import (
    balanced,
    low_rank_pair,
    pair_of_product,
    whitening,
)
from torchao_masquant.solver.gauge import fitted_gauge
from torchao_masquant.solver.in_place import ROWS
from torchao_masquant.solver.judge import mean_log_error
from torchao_masquant.solver.modality_input import ModalityInput, modality_inputs
from torchao_masquant.solver.rotation import rotated, rotated_both
from torchao_masquant.solver.sampled_outputs import sampled_outputs, sampled_rank
from torchao_masquant.solver.shared_weight import (
    JointHessian,
    SharedWeight,
    round_to_nearest,
)
from torchao_masquant.solver.smoothing import (
    WeightSizes,
    factors_of_ranges,
    smoothing_factor,
    smoothing_factors,
)
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import low_rank_dtype, quantize_low_rank_pair
from torchao_masquant.threads import threads_for, widest

__all__ = [
    "ROUNDED_TOGETHER",
    "factors_alone",
    "rounded_together",
    "shares_of",
    "solve_group",
]

#: Values of weights; the rounding of few rows is all overhead.
ROUNDED_TOGETHER = 1 << 23

# Times the energy of a token of the quietest modality.
_LOUDEST = 10.0

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
    channels: Optional[torch.Tensor] = None,
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
        channels: where factors are to be folded, see
            :func:`~torchao_masquant.solver.smoothing.smoothing_factors`.
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
        if others and not options.procedure.per_modality:
            layers |= _shared_factor(others, statistics, options)
        elif others:
            if ranks is None:
                ranks = _uniform_ranks(others, len(statistics.moments) - 1, options)
            inputs = modality_inputs(statistics, options, spend=spend_statistics)
            if factors is None:
                layers |= _chosen(others, statistics, options, ranks, inputs, channels)
            else:
                sizes = WeightSizes.of(others)
                for name, weight in others.items():
                    problem = _Problem({name: weight}, ranks, sizes, inputs, options)
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
    inputs: Sequence[ModalityInput],
    channels: Optional[torch.Tensor],
) -> dict[str, LayerRecipe]:
    """Of exponents and separations the best, tried on some of the outputs of wide ones."""
    sizes = WeightSizes.of(weights)
    alphas, separations = options.alphas, options.separations
    if len(alphas) + len(separations) == 2:
        problem = _Problem(weights, ranks, sizes, inputs, options, channels)
        return problem.solve(alphas[0], separations[0])
    some = sampled_outputs(weights)
    some_ranks = {
        name: [sampled_rank(r, weights[name].shape, w.shape) for r in ranks[name]]
        for name, w in some.items()
    }
    problem = _Problem(some, some_ranks, sizes, inputs, options, channels)
    least, best = float("inf"), (alphas[0], separations[0])
    layers: dict[str, LayerRecipe] = {}

    def attempt(alpha: float, separation: float) -> None:
        nonlocal least, best, layers
        found = problem.solve(alpha, separation)
        error = mean_log_error(some, found, statistics, options)
        # The first of equals is kept.
        if not layers or error < least:
            least, best, layers = error, (alpha, separation), found

    for alpha in alphas:
        attempt(alpha, separations[0])
    best_alpha = best[0]
    for separation in separations[1:]:
        attempt(best_alpha, separation)
    if all(some[name].shape == weight.shape for name, weight in weights.items()):
        return layers
    del layers
    problem = _Problem(weights, ranks, sizes, inputs, options, channels)
    return problem.solve(*best)


class _Problem:
    """Linears that share an input, and what serves every exponent and separation.

    Args:
        weights: name to (N_i, K).
        ranks: name to the rank of modality 1, 2, ...
        sizes: of all weights' channels, where these are a sample of them.
        inputs: of each modality.
        options: of the solution.
        channels: see :func:`solve_group`.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        ranks: Mapping[str, Sequence[int]],
        sizes: WeightSizes,
        inputs: Sequence[ModalityInput],
        options: SolverOptions,
        channels: Optional[torch.Tensor] = None,
    ):
        self.channels = channels
        self.weights, self.ranks, self.sizes = weights, ranks, sizes
        self.inputs, self.options = inputs, options
        self.hadamard_size = options.hadamard_size_of(len(inputs[0].center))
        self._whitenings: dict[int, _Pair] = {}

    def whitening(self, modality: int) -> _Pair:
        """Of the unsmoothed input: see :func:`solver.compensation.whitening`."""
        if modality not in self._whitenings:
            covariance = self.inputs[modality].covariance
            self._whitenings[modality] = whitening(covariance)
        return self._whitenings[modality]

    def solve(self, alpha: float, separation: float) -> dict[str, LayerRecipe]:
        factors = smoothing_factors(
            self.inputs, self.sizes, alpha, separation, self.options, self.channels
        )
        return _PerModality(self, factors, gauge=self.options.procedure.gauge).solve()

    def solve_for(self, factors: torch.Tensor) -> dict[str, LayerRecipe]:
        """For factors (M, K), which no gauge moves."""
        rows = factors.to(self.inputs[0].center.device, torch.float64)
        return _PerModality(self, list(rows), gauge=False).solve()


class _PerModality:
    """MAS and CMC: a smoothing factor, a gauge, a shift and a pair per modality."""

    def __init__(self, problem: _Problem, factors: list[torch.Tensor], *, gauge: bool):
        self.problem, self.weights, self.inputs = (
            problem,
            problem.weights,
            problem.inputs,
        )
        self.options, self.method = problem.options, problem.options.procedure
        self.factors = factors
        self.differ = any(not torch.equal(f, factors[0]) for f in factors[1:])
        # One factor for all modalities leaves nothing for a gauge to make up for.
        self.gauge = gauge and self.differ
        self.shares: list[float]
        self.pairs: dict[str, list[Optional[_Pair]]] = {
            name: [None] * len(factors) for name in self.weights
        }

    def solve(self) -> dict[str, LayerRecipe]:
        weighed = self.method.rounding == "gptq" or self.method.clip
        if self.gauge:
            # What a modality's error weighs depends on its gauge.
            self._fit_gauges(self._all_nearest(None))
        shared = self._weighed() if weighed else self._all_nearest(None)
        if self.gauge and weighed:
            self._fit_gauges(shared)
        self._fit_pairs(shared)
        return {name: self._layer(name, shared[name]) for name in self.weights}

    def _weighed(self) -> dict[str, SharedWeight]:
        """Clipped and rounded by what errors cost."""
        self.shares = shares_of(self.inputs, self.factors)
        if self.method.rounding != "gptq":
            return self._all_nearest(self._total().diagonal())
        hessian = JointHessian(self._total(), self._noise())
        if not hessian.active:
            return self._all_nearest(None)
        shared = self._all_nearest(hessian.importance if self.method.clip else None)
        if self.differ:
            # What pairs will make up for does not draw the weight away.
            self._fit_pairs(shared)
        names = list(self.weights)
        for batch in rounded_together([w.numel() for w in self.weights.values()]):
            shared |= self._rounded([names[i] for i in batch], shared, hessian)
        return shared

    def _all_nearest(
        self, importance: Optional[torch.Tensor]
    ) -> dict[str, SharedWeight]:
        return {name: self._nearest(name, importance) for name in self.weights}

    def _nearest(self, name: str, importance: Optional[torch.Tensor]) -> SharedWeight:
        return round_to_nearest(
            self.weights[name],
            self.factors[0],
            self.options.number_format,
            importance,
            self.problem.hadamard_size,
        )

    def _total(self) -> torch.Tensor:
        """``sum_m v_m A_m``, new memory."""
        fast = self.options.effort == FAST
        total = torch.zeros_like(
            self.inputs[0].covariance, dtype=torch.float32 if fast else torch.float64
        )
        for modality, factor, share in zip(self.inputs, self.factors, self.shares):
            _add_scaled(total, modality.covariance, 1 / factor, share)
        return rotated_both(total, self.problem.hadamard_size)

    def _noise(self) -> torch.Tensor:
        """What rounding adds to the variance of a channel, over modalities."""
        noise = torch.zeros_like(self.factors[0][0])
        if self.options.number_format.weight_only:
            return noise
        size, act_format = (
            self.problem.hadamard_size,
            self.options.number_format.act_format,
        )
        if act_format is not None:
            for modality, factor, share in zip(self.inputs, self.factors, self.shares):
                noise += share * modality.rounding_error(factor, size, act_format)
            return noise
        quant_max = 2 ** (self.options.number_format.act_bits - 1) - 1
        for modality, factor, share in zip(self.inputs, self.factors, self.shares):
            # The variance of what is uniform over a step.
            step = modality.squared_step(factor, size)
            noise += share * step / quant_max**2 / 12
        return noise

    def _target(self, name: str, hessian: JointHessian) -> torch.Tensor:
        size, weight = self.problem.hadamard_size, self.weights[name].double()
        base = rotated(weight * self.factors[0], size)
        if not self.differ:
            return hessian.target(base)
        wanted = torch.zeros_like(base)
        for modality, factor, pair, share in zip(
            self.inputs, self.factors, self.pairs[name], self.shares
        ):
            met = weight @ modality.covariance
            if pair is not None:
                down = rotated(pair[0].double().t(), size) / factor
                met -= pair[1].double().t() @ (down @ modality.covariance)
            wanted.add_(met / factor, alpha=share)
        return hessian.target_of(base, rotated(wanted, size))

    def _rounded(
        self,
        names: Sequence[str],
        shared: dict[str, SharedWeight],
        hessian: JointHessian,
    ) -> dict[str, SharedWeight]:
        targets = [self._target(name, hessian) for name in names]
        found = hessian.rounded(
            torch.cat(targets),
            SharedWeight.cat([shared[name] for name in names]),
            self.options.number_format,
        )
        return dict(zip(names, found.split([len(target) for target in targets])))

    def _fit_gauges(self, shared: dict[str, SharedWeight]) -> None:
        for index in range(1, len(self.inputs)):
            g = fitted_gauge(self._gauge_terms(shared, index))
            self.factors[index] = self.factors[index] / g

    def _gauge_terms(
        self, shared: dict[str, SharedWeight], index: int
    ) -> Iterator[tuple[float, float, float]]:
        covariance = self.inputs[index].covariance
        for name, weight in self.weights.items():
            weight = weight.double()
            difference = weight - self._met(shared[name], index)
            product = difference @ covariance
            yield (
                ((weight @ covariance) * weight).sum().item(),
                (product * weight).sum().item(),
                (product * difference).sum().item(),
            )

    def _met(self, shared: SharedWeight, index: int) -> torch.Tensor:
        """(N, K) float64, the shared weight as unsmoothed tokens of a modality meet it."""
        values = rotated(shared.dequantize(), self.problem.hadamard_size)
        return values / self.factors[index]

    def _fit_pairs(self, shared: dict[str, SharedWeight]) -> None:
        for name in self.weights:
            for index in range(1, len(self.inputs)):
                rank = self.problem.ranks[name][index - 1]
                if rank:
                    self.pairs[name][index] = self._pair(
                        name, index, shared[name], rank
                    )

    def _pair(
        self, name: str, index: int, shared: SharedWeight, rank: int
    ) -> Optional[_Pair]:
        difference = self.weights[name].double() - self._met(shared, index)
        covariance = self.inputs[index].covariance
        n, k = difference.shape
        if n <= k:
            pair = pair_of_product(difference, rank, difference @ covariance)
        else:
            whitened = self.problem.whitening(index)
            pair = low_rank_pair(difference, rank, covariance, whitened)
        if pair is None:
            return None
        # The pair meets smoothed and rotated tokens; what it is found for is neither.
        factor, size = self.factors[index], self.problem.hadamard_size
        down, up = rotated(pair[0].t() * factor, size).t(), pair[1]
        return self._held(balanced(down, up), self.weights[name].dtype)

    def _held(self, pair: _Pair, dtype: torch.dtype) -> _Pair:
        """The pair as the model will hold it: what comes after makes up for that."""
        if self.options.low_rank_bits == 8:
            l1, l2, scale = quantize_low_rank_pair(*pair)
            return l1.float() * scale, l2.float()
        held = low_rank_dtype(dtype)
        return pair[0].to(held), pair[1].to(held)

    def _layer(self, name: str, shared: SharedWeight) -> LayerRecipe:
        weight, pairs = self.weights[name].double(), self.pairs[name]
        values = shared.dequantize()
        biases = []
        for factor, modality, pair in zip(self.factors, self.inputs, pairs):
            left = (modality.center - modality.shift) / factor
            left = rotated(left, self.problem.hadamard_size)
            met = values @ left
            if pair is not None:
                met = met + (left @ pair[0].double()) @ pair[1].double()
            biases.append(weight @ modality.center - met)
        found = [pair for pair in pairs if pair is not None]
        ready = self.method.rounding == "gptq" or self.method.clip
        shifts = [i.shift / f for i, f in zip(self.inputs, self.factors)]
        return LayerRecipe(
            shape=(weight.shape[0], weight.shape[1]),
            fingerprint=weight_fingerprint(self.weights[name]),
            smoothing_factor=torch.stack(
                self.factors[:1] if self.method.folded else self.factors
            )
            .float()
            .cpu(),
            ranks=tuple(0 if p is None else p[0].shape[1] for p in pairs[1:])
            if found
            else (),
            l1=torch.cat([l1 for l1, _ in found], dim=1).cpu() if found else None,
            l2=torch.cat([l2 for _, l2 in found], dim=0).cpu() if found else None,
            modality_bias=torch.stack(biases).float().cpu()
            if self.method.centered
            else None,
            act_shift=torch.stack(shifts).float().cpu() if self.method.shift else None,
            qdata=shared.qdata.cpu() if ready else None,
            scale=shared.scale.cpu() if ready else None,
            zero_point=shared.zero_point.cpu()
            if ready and shared.zero_point is not None
            else None,
            row_scale=shared.row_scale.cpu()
            if ready and shared.row_scale is not None
            else None,
            hadamard_size=self.problem.hadamard_size,
        )


def rounded_together(values: Sequence[int]) -> list[list[int]]:
    """Which linears are rounded one below the other, in one go.

    Args:
        values: of each one's weight.

    Returns:
        Their numbers, in order.
    """
    batches: list[list[int]] = []
    held = 0
    for index, count in enumerate(values):
        held += count
        if not batches or held > ROUNDED_TOGETHER:
            batches.append([])
            held = count
        batches[-1].append(index)
    return batches


def shares_of(
    inputs: Sequence[ModalityInput], factors: Sequence[torch.Tensor]
) -> list[float]:
    """What a modality's squared error weighs.

    As its tokens do, so that loud tokens count for more than quiet ones, which is what
    they do in what comes next. But one that is far louder than the quietest counts as if
    it were so many times as loud, for it would leave the other no say at all.

    Args:
        inputs: of each modality.
        factors: (K,) of each; a gauge has made them commensurable where they differ.
    """
    energies = [
        ((i.tokens - i.center) / f).square().sum(1).mean().item()
        if len(i.tokens)
        else 0.0
        for i, f in zip(inputs, factors)
    ]
    quietest = min((e for e in energies if e > 0), default=0.0)
    return [
        i.share / max(1.0, e / (_LOUDEST * quietest)) if quietest else i.share
        for i, e in zip(inputs, energies)
    ]


def _add_scaled(
    total: torch.Tensor, covariance: torch.Tensor, scale: torch.Tensor, share: float
) -> None:
    """Add ``share C * (scale scale^T)``, a few rows at a time."""
    for rows, of_rows, own in zip(
        total.split(ROWS), covariance.split(ROWS), scale.split(ROWS)
    ):
        rows.add_(of_rows * torch.outer(share * own, scale))


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
    factors = torch.stack(
        factors_of_ranges(
            ranges,
            WeightSizes.of(weights).absmax,
            options.alphas[0],
            options.separations[0],
        )
    )
    found = {}
    for name, weight in weights.items():
        found[name] = _with_factor(weight)
        if not options.spares(name):
            found[name].smoothing_factor = factors.float().cpu()
    return found


def _shared_factor(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """One factor for all tokens, whatever their modality."""
    factor = None
    if options.procedure.smooth:
        absmax = torch.stack([m.absmax() for m in statistics.moments]).amax(0)
        weight_absmax = WeightSizes.of(weights).absmax
        factor = smoothing_factor(absmax, weight_absmax, options.alphas[0])
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
