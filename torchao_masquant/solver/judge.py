# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which of two solutions is the better one, by what it does to sampled tokens."""

import math

import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["mean_log_error", "token_error"]


def mean_log_error(
    weights: dict[str, torch.Tensor],
    layers: dict[str, LayerRecipe],
    statistics: InputStatistics,
    options: SolverOptions,
) -> float:
    """Mean over linears and modalities of the logarithm of the relative error.

    The quantized linears run on the sampled tokens. The error is relative to what varies
    from token to token in the output: a constant carries no information, and on outlier
    tokens it is most of the energy. Ten times it, times ``log10(e)``, is minus the mean
    centred SQNR in dB.

    Args:
        weights: name to (N_i, K).
        layers: solution for them.
        statistics: with samples of the input's tokens.
        options: that the solution is for; its modality weights count.

    Returns:
        Smaller is better.
    """
    total = count = 0.0
    for name, weight in weights.items():
        quantized = layers[name].quantize(
            weight, options.number_format, statistics.modalities, options.low_rank_bits
        )
        for index, importance in enumerate(options.weights_of(statistics.modalities)):
            error, _, energy = token_error(weight, quantized, statistics, index)
            if energy <= 0 or importance <= 0:
                continue
            total += importance * math.log(error / energy + 1e-30)
            count += importance
    return total / count if count else 0.0


def token_error(
    weight: torch.Tensor,
    quantized: MASQuantTensor,
    statistics: InputStatistics,
    index: int,
) -> tuple[float, float, float]:
    """What a quantized linear does to the sampled tokens of a modality.

    Args:
        weight: (N, K).
        quantized: that of a solution for it.
        statistics: with samples of the input's tokens.
        index: of the modality.

    Returns:
        Sums over the tokens of the squared error, of the energy that a typical one's output
        has, and of their energy about their mean; zeros where there are no two tokens.
    """
    tokens = statistics.moments[index].sample
    if tokens.shape[0] < 2:
        return 0.0, 0.0, 0.0
    exact = tokens.double() @ weight.double().t()
    varying = (exact - exact.mean(0)).square().sum().item()
    ids = torch.full((tokens.shape[0],), index, device=tokens.device)
    y = torch.ops.masquant.linear(tokens, quantized, ids, None)
    error = (y.double() - exact).square().sum().item()
    energies = exact.square().sum(1)
    # Of attention sinks a few outputs have nearly all of the energy.
    typical = energies.median().item() or energies.mean().item()
    return error, len(tokens) * typical, varying
