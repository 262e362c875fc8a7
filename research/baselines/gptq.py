# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""GPTQ on top of SmoothQuant: one Hessian of all tokens, whatever their modality."""

from typing import Optional

import torch

from torchao_masquant.options import Scheme
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.solver.shared_weight import JointHessian, round_to_nearest
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["gptq"]


def gptq(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    smoothquant: dict[str, LayerRecipe],
    bits: Scheme,
) -> dict[str, LayerRecipe]:
    """Round the weights that SmoothQuant smoothed by GPTQ (arXiv 2210.17323).

    torchao's GPTQ is for weight-only linears without smoothing; the rounding itself is
    the package's, with one "modality" of all tokens and their uncentred second moment.

    Args:
        weights: name to (N_i, K) of linears that share their input.
        statistics: of that input.
        smoothquant: SmoothQuant's solution for them.
        bits: integer formats.
    """
    count = sum(m.count for m in statistics.moments)
    second = sum(m.outer for m in statistics.moments if m.outer is not None) / count
    none = torch.zeros_like(second[0, 0])
    hessian: Optional[JointHessian] = None
    layers = {}
    for name, weight in weights.items():
        layer = smoothquant[name]
        factor = layer.smoothing_factor[0].double()
        if hessian is None:
            # All of them have the same factor.
            hessian = JointHessian(second / torch.outer(factor, factor), none)
        found = round_to_nearest(weight, factor, bits)
        if hessian.active:
            found = hessian.rounded(weight.double() * factor, found, bits)
        layers[name] = LayerRecipe(
            layer.shape,
            layer.fingerprint,
            layer.smoothing_factor,
            qdata=found.qdata,
            scale=found.scale,
            zero_point=found.zero_point,
            row_scale=found.row_scale,
        )
    return layers
