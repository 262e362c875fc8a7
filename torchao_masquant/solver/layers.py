# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the linears that share one input."""

from typing import Optional

import torch

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.compensation import (
    low_rank_pair,
    resolve_rank,
    whitening,
)
from torchao_masquant.solver.gauge import gauge
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.solver.smoothing import smoothing_factor
from torchao_masquant.tensor_subclasses import (
    dequantize_smoothed_weight,
    low_rank_dtype,
    quantize_smoothed_weight,
)

__all__ = ["solve_group"]


@torch.inference_mode(False)
@torch.no_grad()
def solve_group(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> dict[str, LayerRecipe]:
    """Smoothing factors, gauges and pairs of the linears that share one input.

    Args:
        weights: name to (N_i, K) floating point weight.
        statistics: of the shared input.
        options: scheme, method, alpha and rank.

    Returns:
        Name to the layer's part of a recipe, on the CPU.

    Raises:
        ValueError: a weight holds nan or inf.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: its weight holds nan or inf.")
    method = options.parts
    if not method.per_modality:
        factor = _shared_factor(weights, statistics, options)
        return {
            name: LayerRecipe(
                shape=(weight.shape[0], weight.shape[1]),
                fingerprint=weight_fingerprint(weight),
                smoothing_factor=factor.float()[None].cpu(),
            )
            for name, weight in weights.items()
        }

    weight_absmax = _weight_absmax(weights)
    factors = [
        smoothing_factor(m.absmax, weight_absmax, options.alpha)
        for m in statistics.moments
    ]
    # The integers are made from the float32 factor, as they will be at convert.
    pre_scale = factors[0].float().reciprocal()
    bits = options.bits
    shared = {}
    for name, weight in weights.items():
        qdata, scale, zero_point = quantize_smoothed_weight(
            weight,
            pre_scale,
            bits.weight_bits,
            bits.group_size,
            symmetric=bits.symmetric,
        )
        shared[name] = dequantize_smoothed_weight(qdata, scale, zero_point=zero_point)

    pairs: dict[str, list[Optional[tuple[torch.Tensor, torch.Tensor]]]] = {
        name: [] for name in weights
    }
    biases: dict[str, list[torch.Tensor]] = {name: [] for name in weights}
    for index, moments in enumerate(statistics.moments[1:], start=1):
        covariance = moments.covariance(method.centered)
        if method.gauge:
            factors[index] /= gauge(
                list(weights.values()),
                list(shared.values()),
                factors[index],
                covariance,
            )
        factor = factors[index]
        whitened = whitening(covariance / torch.outer(factor, factor))
        for name, weight in weights.items():
            difference = weight.double() * factor - shared[name].double()
            pair = low_rank_pair(
                difference, resolve_rank(options.rank, *weight.shape), whitened
            )
            if pair is not None:
                # What the model will hold; the bias makes up for its rounding too.
                dtype = low_rank_dtype(weight.dtype)
                pair = (pair[0].to(dtype), pair[1].to(dtype))
                difference = difference - (pair[0].double() @ pair[1].double()).t()
            pairs[name].append(pair)
            if method.centered:
                biases[name].append(difference @ (moments.mean() / factor))

    smoothing = torch.stack(factors).float().cpu()
    return {
        name: _layer(weight, smoothing, pairs[name], biases[name])
        for name, weight in weights.items()
    }


def _layer(
    weight: torch.Tensor,
    smoothing: torch.Tensor,
    pairs: list[Optional[tuple[torch.Tensor, torch.Tensor]]],
    biases: list[torch.Tensor],
) -> LayerRecipe:
    found = [pair for pair in pairs if pair is not None]
    return LayerRecipe(
        shape=(weight.shape[0], weight.shape[1]),
        fingerprint=weight_fingerprint(weight),
        smoothing_factor=smoothing.clone(),
        ranks=tuple(0 if pair is None else pair[0].shape[1] for pair in pairs)
        if found
        else (),
        l1=torch.cat([l1 for l1, _ in found], dim=1).cpu() if found else None,
        l2=torch.cat([l2 for _, l2 in found], dim=0).cpu() if found else None,
        modality_bias=torch.stack(biases).float().cpu() if biases else None,
    )


def _weight_absmax(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    maxima = [weight.abs().amax(0).double() for weight in weights.values()]
    return torch.stack(maxima).amax(0)


def _shared_factor(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    options: SolverOptions,
) -> torch.Tensor:
    """(K,) float64: one factor for all tokens, whatever their modality."""
    absmax = torch.stack([m.absmax for m in statistics.moments]).amax(0)
    if not options.parts.smooth:
        return torch.ones_like(absmax)
    return smoothing_factor(absmax, _weight_absmax(weights), options.alpha)
