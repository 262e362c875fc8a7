# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The step "convert" with a recipe, or with a method that needs no data."""

from typing import Optional

import torch
from torch import nn

from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight, experts_of
from torchao_masquant.in_memory import check_in_memory
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.names import named_here
from torchao_masquant.recipe import LayerRecipe, Recipe, weight_fingerprint
from torchao_masquant.selection import check_whole, match_names
from torchao_masquant.steps.actions import (
    Actions,
    conversions,
    quantized_with,
    router_for,
    select_rest,
)
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["plan_recipe", "plan_rounding"]


def plan_recipe(model: nn.Module, config: MASQuantConfig, recipe: Recipe) -> Actions:
    """Quantize what a recipe was made for.

    Raises:
        ValueError: the recipe was made for other weights, or all is quantized already.
    """
    modules = dict(model.named_modules())
    saved = named_here(model, recipe.layers)
    names = match_names(list(saved), config.include, config.exclude)
    layers = {name: saved[name] for name in names}
    experts = experts_of(model)

    # A call that did not finish may have been there.
    done = {
        name
        for name in names
        if layers[name].made(
            _held_weight(modules.get(name), experts.get(name)),
            config.options.number_format,
            recipe.modalities,
            config.options.low_rank_bits,
        )
    }
    if len(done) == len(names):
        raise ValueError(f"{names[0]} is quantized already.")
    left = {name: layer for name, layer in layers.items() if name not in done}
    for name, layer in left.items():
        if len(layer.shape) == 3:
            _check_experts(model, experts.get(name), name, layer)
        else:
            _check_layer(model, modules.get(name), name, layer)
    check_whole(names, experts)
    return conversions(model, left, config, router_for(model, recipe.modalities, left))


def _held_weight(
    module: Optional[nn.Module], experts: Optional[ExpertWeight] = None
) -> Optional[torch.Tensor]:
    """What a linear, or a projection of experts, holds as its weight."""
    if experts is not None:
        return getattr(experts.module, experts.parameter).data
    weight = getattr(module, "weight", None)
    return weight.data if isinstance(weight, nn.Parameter) else None


def plan_rounding(model: nn.Module, config: MASQuantConfig) -> Actions:
    """Round what is chosen, by the method that needs no data.

    Raises:
        ValueError: as :func:`~torchao_masquant.selection.select`; a weight is on the meta
            device, or a group size does not divide its rows.
    """
    modalities = base_first(model, config.base_modality, config.modalities)
    bits = config.options.number_format

    def is_made(name: str, weight: MASQuantTensor) -> bool:
        return LayerRecipe.rounded(weight.shape).made(weight, bits, modalities)

    done = quantized_with(model, is_made)
    selected = select_rest(model, config, modalities, done)
    check_request(model, selected, modalities, config.options)
    layers = {}
    for name, weight in selected.weights.items():
        check_in_memory(name, weight, model)
        layers[name] = LayerRecipe.rounded(weight.shape)
    return conversions(model, layers, config, router_for(model, modalities, layers))


_AGAIN = "use the model that it was made for, or calibrate again"


def _check_experts(
    model: nn.Module, weight: Optional[ExpertWeight], name: str, layer: LayerRecipe
) -> None:
    """Raise unless a recipe's layer was made for these experts."""
    if weight is None:
        raise ValueError(
            f"the recipe was made for another model: this one has no {name}; {_AGAIN}."
        )
    if isinstance(weight.module, MASQuantExperts):
        raise ValueError(f"{name} is quantized already.")
    held = type(weight.weight)
    if held is not torch.Tensor or isinstance(weight.module, MASQuantObservedExperts):
        raise ValueError(f"{name} holds no plain tensor (a {held.__name__}); {_AGAIN}.")
    _check_values(model, weight.weight, name, layer)


def _check_layer(
    model: nn.Module, module: Optional[nn.Module], name: str, layer: LayerRecipe
) -> None:
    """Raise unless a recipe's layer was made for this module."""
    if module is None:
        raise ValueError(
            f"the recipe was made for another model: this one has no {name}; {_AGAIN}."
        )
    if isinstance(module, MASQuantLinear):
        raise ValueError(f"{name} is quantized already.")
    if type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor:
        raise ValueError(
            f"{name} is a {type(module).__name__}, not a plain nn.Linear with a plain "
            f"weight; {_AGAIN}."
        )
    _check_values(model, module.weight, name, layer)


def _check_values(
    model: nn.Module, weight: torch.Tensor, name: str, layer: LayerRecipe
) -> None:
    """Raise unless a recipe's layer was made for this weight."""
    if tuple(weight.shape) != tuple(layer.shape):
        raise ValueError(
            f"{name}: the recipe was made for a weight of shape {tuple(layer.shape)}, "
            f"the model's is {tuple(weight.shape)}; {_AGAIN}."
        )
    check_in_memory(name, weight, model)
    fingerprint = weight_fingerprint(weight)
    if fingerprint != layer.fingerprint:
        raise ValueError(
            f"{name}: the recipe was made for a weight with fingerprint "
            f"{layer.fingerprint}, the model's is {fingerprint}; {_AGAIN}."
        )
