# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What linears are rounded for behind others that are: to undo what those have lost.

A linear of weight ``W`` reads ``x`` where the one of the full-precision stream reads
``z = x + d``, and should still give ``W z``. With

    C = sum_m v_m E[(x - c_m) (x - c_m)^T]
    D = sum_m v_m E[(d - d_m) (x - c_m)^T]
    V = sum_m v_m E[e (d - d_m)^T]

``v_m`` what a modality's error weighs, as in joint rounding, and ``e`` what the ridge
regression of ``d`` on ``z`` leaves of it, the weight is

    W' = W + W (D + V / 2) (C - V / 2 + R)^-1

It is rounded in place of ``W``, and the modality's bias takes ``W d_m``. The ridge ``R`` is
as large as the mean variance of a smoothed channel: directions that tokens hardly have
would be fitted to what a few calibration tokens happen to do there.

Without ``V`` that is the regression of ``W z`` on ``x``, which shrinks: ``e``, what rounding
has added to the stream, is in ``x`` and not in ``z``. With all of it, it is the regression
with ``z`` as the instrument, which does not shrink and lets all of ``e`` through. Half of
the way is Theil's k-class of estimators at k = 1/2.

GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695) regress on ``x``, for one kind of
token.
"""

import dataclasses
from dataclasses import dataclass
from typing import Mapping

import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.layers import shares_of
from torchao_masquant.solver.modality_input import (
    ModalityInput,
    modality_inputs,
    ordinary,
)
from torchao_masquant.solver.smoothing import WeightSizes, smoothing_factors
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import low_rank_dtype
from torchao_masquant.threads import threads_for, widest

__all__ = ["Correction", "corrected"]

# Times the mean variance of a channel.
_RIDGE = 1.0
# How much of the way from least squares to the model's own input as the instrument.
_WAY = 0.5


@dataclass(frozen=True)
class Correction:
    """Weights that undo an error of their input, in place of a model's.

    Attributes:
        originals: name to (N, K), the model's.
        weights: name to (N, K) float32, what to solve for.
        biases: name to (M, N) float64, what each modality's bias has beside what the
            solution for these weights gives it.
    """

    originals: Mapping[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]

    def applied(self, layers: Mapping[str, LayerRecipe]) -> dict[str, LayerRecipe]:
        """Solutions for the weights, as ones of the model's own.

        Args:
            layers: of these names, and of others, which are left out.
        """
        return {name: self._applied(name, layers[name]) for name in self.weights}

    def _applied(self, name: str, layer: LayerRecipe) -> LayerRecipe:
        assert layer.modality_bias is not None
        original = self.originals[name]
        bias = layer.modality_bias.double() + self.biases[name].cpu()
        # As the model will hold them: the corrected weight has more bits than its own.
        # Those of 8 bits are in float32, and exact.
        held = low_rank_dtype(original.dtype)
        pairs = {
            factor: value.to(held)
            for factor in ("l1", "l2")
            if (value := getattr(layer, factor)) is not None and value.itemsize == 2
        }
        return dataclasses.replace(
            layer,
            fingerprint=weight_fingerprint(original),
            modality_bias=bias.float(),
            **pairs,
        )


@torch.inference_mode(False)
@torch.no_grad()
def corrected(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> Correction:
    """What linears that share an input should be rounded for.

    Args:
        weights: name to (N, K).
        statistics: of the input in the quantized stream, with its drifts.
        options: of the solution.
    """
    with threads_for(widest(weights.values())):
        inputs = modality_inputs(statistics, options)
        centers = [modality.center for modality in inputs]
        factors = smoothing_factors(
            inputs,
            WeightSizes.of(weights),
            options.alphas[0],
            options.separations[0],
            options,
        )
        shares = shares_of(inputs, factors)
        covariance, cross, outer, drifts = _together(statistics, inputs, shares)
        change = _regression(covariance, cross, outer, factors[0])
        moved = torch.stack(drifts)
        result, biases = {}, {}
        for name, weight in weights.items():
            exact = weight.double()
            result[name] = (exact + exact @ change).float()
            # The solution makes up for the mean of what it is given, as it gives it.
            biases[name] = (
                moved @ exact.t()
                + torch.stack(centers) @ (exact - result[name].double()).t()
            )
        return Correction(dict(weights), result, biases)


def _together(
    statistics: InputStatistics, inputs: list[ModalityInput], shares: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(K, K) sums over modalities of ``E[x x^T]``, ``E[d x^T]`` and ``E[d d^T]``.

    About a centre of each modality, the mean of ordinary tokens, and of their drifts.

    Args:
        inputs: spent.
        shares: what a modality's error weighs.

    Returns:
        And (K,) mean of each modality's drift, of ordinary tokens.
    """
    covariance, cross, outer = (
        torch.zeros_like(statistics.drifts[0].cross) for _ in range(3)
    )
    drifts = []
    for moments, drift, share in zip(statistics.moments, statistics.drifts, shares):
        # One at a time: each has a covariance.
        modality = inputs.pop(0)
        own = modality.covariance
        covariance.add_(own, alpha=share)
        rows = ordinary(moments.sample.double())
        mean, typical = drift.sum / moments.count, drift.sampled.rows[rows].mean(0)
        if len(rows) == moments.count and rows.all():
            typical = mean
        found = drift.cross / moments.count
        found.addr_(typical, moments.mean(), alpha=-1)
        found.addr_(mean - typical, modality.center, alpha=-1)
        # What is constant to within rounding tells nothing of what drifts with it.
        found[:, own.diagonal() == 0] = 0
        cross.add_(found, alpha=share)
        outer.add_(drift.outer, alpha=share / moments.count)
        outer.addr_(typical, mean, alpha=-share)
        outer.addr_(mean - typical, typical, alpha=-share)
        drifts.append(typical)
    return covariance, cross, outer, drifts


def _regression(
    covariance: torch.Tensor,
    cross: torch.Tensor,
    outer: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """(K, K) ``(D + V / 2) (C - V / 2 + R)^-1``; spends what it is given.

    Args:
        covariance: C.
        cross: D.
        outer: (K, K) ``E[d d^T]`` about the means.
        factor: (K,) that channels are divided by before they are rounded.
    """
    squares = factor.square()
    ridge = _RIDGE * (covariance.diagonal() / squares).mean() * squares
    if not ridge.any():
        # Nothing varies, so there is nothing to tell from.
        return torch.zeros_like(covariance)
    covariance.diagonal().add_(ridge)
    with_exact = cross + outer
    exact = covariance + cross
    exact += with_exact.t()
    told = torch.linalg.solve_triangular(
        torch.linalg.cholesky(exact), with_exact.t(), upper=False
    )
    del exact, with_exact
    # V is at most C + R, whatever the drift: a ridge regression on z errs no more than
    # one of nothing on it, so that what is left of C + R is positive definite.
    untold = outer.addmm_(told.t(), told, alpha=-1)
    covariance.add_(untold, alpha=-_WAY)
    cross.add_(untold, alpha=_WAY)
    lower = torch.linalg.cholesky(covariance)
    return torch.cholesky_solve(cross.t(), lower).t()
