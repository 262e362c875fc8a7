# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solving for the experts of a mixture."""

import torch

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.solver.compensation import resolve_rank
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.methods import AUTO, SolverOptions
from torchao_masquant.solver.ranks import AUTO_SHARE

__all__ = ["solve_experts"]


def solve_experts(
    name: str,
    weight: torch.Tensor,
    statistics: InputStatistics,
    options: SolverOptions,
) -> LayerRecipe:
    """All that quantizes one projection of the experts of a layer.

    They are solved for as linears that share an input: one smoothing factor, gauge and
    shift for each modality, integers, pair and biases for each expert, all from the
    statistics of what all experts read. An expert's own tokens may be few, or none.

    Args:
        name: of the weight, for messages.
        weight: (E, N, K) floating point.
        statistics: of the tokens that the experts read.
        options: scheme, method, alpha and rank. A rank of "auto" is the same share for
            all experts, since they are held in one tensor.

    Returns:
        The part of a recipe, on the CPU.

    Raises:
        ValueError: a weight holds nan or inf.
    """
    experts = {f"{name}[{e}]": of_expert for e, of_expert in enumerate(weight)}
    ranks = None
    if options.parts.per_modality and options.rank == AUTO:
        share = resolve_rank(AUTO_SHARE, *weight.shape[1:])
        ranks = {key: [share] * (len(statistics.moments) - 1) for key in experts}
    layers = solve_group(experts, statistics, options, ranks)
    return LayerRecipe.stack(list(layers.values()), weight_fingerprint(weight))
