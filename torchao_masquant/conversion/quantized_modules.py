# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The quantized linears and experts of a model, as one kind of thing."""

from typing import Mapping, Optional, Union

from torch import nn

from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.models.experts import ExpertWeight, Layer, projections
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "QuantizedModule",
    "quantized_modules",
    "quantized_weights",
    "replace_weights",
]

QuantizedModule = Union[MASQuantLinear, MASQuantExperts]


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """All of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (MASQuantLinear, MASQuantExperts))
    }


def quantized_weights(module: QuantizedModule) -> dict[str, MASQuantTensor]:
    """Name of each quantized parameter of one of them to what it holds."""
    names = projections(module) if isinstance(module, MASQuantExperts) else ("weight",)
    return {name: getattr(module, name).data for name in names or ()}


def replace_weights(
    layers: Mapping[str, Layer],
    weights: Mapping[str, MASQuantTensor],
    router: Optional[Router],
) -> QuantizedModule:
    """Give a linear, or experts, quantized weights and a class that computes with them.

    Args:
        layers: all of one module, by their names in the model.
        weights: of the same names.
        router: of the model; needed where a weight is routed.

    Returns:
        The module itself, changed in place.

    Raises:
        ValueError: as :meth:`MASQuantLinear.from_float` and
            :meth:`MASQuantExperts.from_float`.
    """
    name, layer = next(iter(layers.items()))
    if not isinstance(layer, ExpertWeight):
        return MASQuantLinear.from_float(layer, weights[name], name, router)
    parameters = {
        name.rpartition(".")[2]: weight
        for name, weight in weights.items()
        if name in layers
    }
    fqn = name.rpartition(".")[0]
    return MASQuantExperts.from_float(layer.module, parameters, fqn, router)
