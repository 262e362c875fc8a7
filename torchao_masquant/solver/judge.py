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

__all__ = ["mean_log_error"]


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
        for index, (moments, importance) in enumerate(
            zip(statistics.moments, options.weights_of(statistics.modalities))
        ):
            tokens = moments.sample
            exact = tokens.double() @ weight.double().t()
            energy = (exact - exact.mean(0)).square().sum().item()
            if tokens.shape[0] < 2 or energy <= 0 or importance <= 0:
                continue
            ids = torch.full((tokens.shape[0],), index, device=tokens.device)
            y = torch.ops.masquant.linear(tokens, quantized, ids, None)
            error = (y.double() - exact).square().sum().item()
            total += importance * math.log(error / energy + 1e-30)
            count += importance
    return total / count if count else 0.0
