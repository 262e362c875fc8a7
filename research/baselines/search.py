# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""AWQ's search for one factor for all tokens, and MBQ's, which balances modalities."""

from typing import Optional, Sequence

import torch

from torchao_masquant.options import Scheme
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["searched_factor"]

_STEPS = 20


def searched_factor(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    bits: Scheme,
    sensitivity: Optional[Sequence[float]] = None,
) -> dict[str, LayerRecipe]:
    """The exponent of ``mean |x| ** a`` with the smallest error of the linears' output.

    AWQ (arXiv 2306.00978): 20 exponents, tokens pooled. MBQ (arXiv 2412.19509): the same,
    with the mean absolute error of each modality weighed by its sensitivity. torchao's
    AWQ is for weight-only linears; here activations are quantized where the scheme does.

    Args:
        weights: name to (N_i, K) of linears that share their input.
        statistics: of that input, with samples of tokens.
        bits: integer formats.
        sensitivity: of each modality, base first; None: AWQ.
    """
    samples = [m.sample for m in statistics.moments]
    counts = torch.tensor([float(m.count) for m in statistics.moments])
    means = torch.stack([s.abs().mean(0) for s in samples])
    magnitude = (means * counts[:, None]).sum(0) / counts.sum()
    best, least = None, float("inf")
    for step in range(_STEPS):
        factor = magnitude.clamp_min(1e-4) ** (step / _STEPS)
        factor = factor / (factor.max() * factor.min()).sqrt()
        layers = {
            name: LayerRecipe(
                (weight.shape[0], weight.shape[1]),
                weight_fingerprint(weight),
                factor[None].clone(),
            )
            for name, weight in weights.items()
        }
        error = 0.0
        for name, weight in weights.items():
            quantized = layers[name].quantize(weight, bits, statistics.modalities)
            for index, (x, count) in enumerate(zip(samples, counts.tolist())):
                left = torch.ops.masquant.linear(x, quantized, None, None)
                left = left - x @ weight.t()
                if sensitivity is None:
                    error += left.square().mean().item() * count
                else:
                    error += left.abs().mean().item() * sensitivity[index]
        if error < least:
            best, least = layers, error
    assert best is not None
    return best
