# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""MR-GPTQ's recipe for small floats: rotated blocks, searched scales, GPTQ."""

import torch

from torchao_masquant.options import Scheme
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.rotation import rotated, rotated_both
from torchao_masquant.solver.shared_weight import JointHessian, round_to_nearest
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["mr_gptq"]

# Channels that are rotated together, at most: its authors' choice for both formats.
_BLOCK = 128


def mr_gptq(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    bits: Scheme,
) -> dict[str, LayerRecipe]:
    """As in arXiv 2509.23202, of one Hessian of all tokens, whatever their modality.

    Its recipe, our code: no smoothing, a Hadamard matrix for each block of neighbouring
    channels of weight and activations, the scales of the weight by a search for the least
    squared error, and GPTQ in the order of the Hessian's diagonal. Scales of rows are this
    package's: a row or a token has one where theirs is a tensor's.

    Args:
        weights: name to (N_i, K) of linears that share their input.
        statistics: of that input.
        bits: number formats.
    """
    count = sum(m.count for m in statistics.moments)
    second = sum(m.outer for m in statistics.moments if m.outer is not None) / count
    k = len(second)
    size = min(k & -k, _BLOCK)
    block = size if size > 1 else None
    hessian = JointHessian(
        rotated_both(second.clone(), block), torch.zeros_like(second[0, 0])
    )
    ones = torch.ones(k, dtype=torch.float64)
    layers = {}
    for name, weight in weights.items():
        found = round_to_nearest(weight, ones, bits, ones, block)
        if hessian.active:
            found = hessian.rounded(rotated(weight.double(), block), found, bits)
        layers[name] = LayerRecipe(
            tuple(weight.shape),
            weight_fingerprint(weight),
            ones.float()[None],
            qdata=found.qdata,
            scale=found.scale,
            zero_point=found.zero_point,
            row_scale=found.row_scale,
            hadamard_size=block,
        )
    return layers
