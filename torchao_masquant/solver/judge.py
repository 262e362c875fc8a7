# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which of two solutions is the better one, by what it does to sampled tokens."""

import math
from typing import NamedTuple, Optional

import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["TokenErrors", "mean_log_error", "token_errors"]


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
            found = token_errors(weight, quantized, statistics, index)
            if found is None or found.varying <= 0 or importance <= 0:
                continue
            total += importance * math.log(found.error / found.varying + 1e-30)
            count += importance
    return total / count if count else 0.0


class TokenErrors(NamedTuple):
    """What a quantized linear does to the sampled tokens of a modality.

    Attributes:
        error: sum over the tokens of the squared error of their outputs.
        varying: of the energy of the exact ones about their mean.
        relative: square of the mean length of a token's error, over the energy that a
            typical output has. A few outputs of attention sinks have nearly all of the energy,
            and of the squared error: in a ratio of sums the rest would count for nothing.
    """

    error: float
    varying: float
    relative: float


def token_errors(
    weight: torch.Tensor,
    quantized: MASQuantTensor,
    statistics: InputStatistics,
    index: int,
) -> Optional[TokenErrors]:
    """Run a quantized linear on the sampled tokens of a modality.

    Args:
        weight: (N, K).
        quantized: that of a solution for it.
        statistics: with samples of the input's tokens.
        index: of the modality.

    Returns:
        None where there is no token, or all outputs are zero.
    """
    tokens = statistics.moments[index].sample
    if tokens.shape[0] == 0:
        return None
    exact = tokens.double() @ weight.double().t()
    varying = (exact - exact.mean(0)).square().sum().item()
    ids = torch.full((tokens.shape[0],), index, device=tokens.device)
    y = torch.ops.masquant.linear(tokens, quantized, ids, None)
    errors, energies = ((y.double() - exact).square().sum(1), exact.square().sum(1))
    typical = energies.median().item() or energies.mean().item()
    if not typical:
        return None
    relative = errors.sqrt().mean().item() ** 2 / typical
    return TokenErrors(errors.sum().item(), varying, relative)
