# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a step does to each module of a model, one function for each."""

from functools import partial
from typing import Callable, Collection, Mapping, Sequence

from torch import nn

from torchao_masquant.config import MASQuantConfig
from torchao_masquant.convert import convert_experts, convert_linear
from torchao_masquant.experts import ExpertWeight, experts_of
from torchao_masquant.integrations.checkpoint_format import (
    quantized_modules,
    quantized_weights,
)
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router, router_of
from torchao_masquant.selection import Selected, select
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "Actions",
    "by_module",
    "conversion_of_experts",
    "conversions",
    "needs_router",
    "quantized_with",
    "router_for",
    "select_rest",
]

#: Module to what changes it.
Actions = dict[nn.Module, Callable[[], object]]


def select_rest(
    model: nn.Module,
    config: MASQuantConfig,
    modalities: Sequence[str],
    done: Collection[nn.Module],
) -> Selected:
    """What is chosen and not done yet, by a call that did not finish.

    Raises:
        ValueError: as :func:`select`, which names a module where all are done.
    """
    given = config.include, config.exclude, config.options, len(modalities)
    selected = select(model, *given, done)
    if done and not selected.weights:
        return select(model, *given)
    return selected


def by_module(
    experts: Mapping[str, ExpertWeight],
) -> dict[nn.Module, dict[str, ExpertWeight]]:
    """Module to its weights of experts by their names in the model."""
    modules: dict[nn.Module, dict[str, ExpertWeight]] = {}
    for name, weight in experts.items():
        modules.setdefault(weight.module, {})[name] = weight
    return modules


def quantized_with(
    model: nn.Module, is_made: Callable[[str, MASQuantTensor], bool]
) -> set[nn.Module]:
    """The linears and experts all of whose weights are quantized in one way.

    Args:
        is_made: of the name of a linear, or of a projection of experts, and its weight.
    """
    return {
        module
        for module in quantized_modules(model)
        if all(
            is_made(
                module.fqn
                if isinstance(module, MASQuantLinear)
                else f"{module.fqn}.{parameter}",
                weight,
            )
            for parameter, weight in quantized_weights(module).items()
        )
    }


def conversions(
    model: nn.Module,
    layers: Mapping[str, LayerRecipe],
    config: MASQuantConfig,
    router: Router,
) -> Actions:
    """What quantizes each module that a part of a recipe is for."""
    modules = dict(model.named_modules())
    experts = {n: w for n, w in experts_of(model).items() if n in layers}
    return {
        modules[name]: partial(
            convert_linear,
            modules[name],
            name,
            layer,
            config.options.number_format,
            router.modalities,
            router,
            config.options.low_rank_bits,
        )
        for name, layer in layers.items()
        if name not in experts
    } | {
        module: conversion_of_experts(
            module, {name: layers[name] for name in weights}, weights, config, router
        )
        for module, weights in by_module(experts).items()
    }


def conversion_of_experts(
    experts: nn.Module,
    layers: Mapping[str, LayerRecipe],
    weights: Mapping[str, ExpertWeight],
    config: MASQuantConfig,
    router: Router,
) -> Callable[[], object]:
    """What quantizes one module of experts.

    Args:
        layers: name in the model of each of its weights to its part of a recipe.
        weights: of those names.
    """
    first = next(iter(weights))
    return partial(
        convert_experts,
        experts,
        first.removesuffix(f".{weights[first].parameter}"),
        {weights[name].parameter: layer for name, layer in layers.items()},
        config.options.number_format,
        router.modalities,
        router,
        config.options.low_rank_bits,
    )


def needs_router(router: Router, layers: Mapping[str, LayerRecipe]) -> bool:
    """Whether a token's modality matters: to a linear, or to refuse it."""
    return not router.is_complete or any(
        layer.smoothing_factor.shape[0] > 1 for layer in layers.values()
    )


def router_for(
    model: nn.Module, modalities: tuple[str, ...], layers: Mapping[str, LayerRecipe]
) -> Router:
    """The model's router, attached to it where it is needed.

    Raises:
        ValueError: the model has one for other modalities.
    """
    router = router_of(model)
    if router is not None:
        if router.modalities != modalities:
            raise ValueError(
                f"linears of the model are quantized for the modalities "
                f"{router.modalities} already, the recipe is for {modalities}."
            )
    else:
        router = Router.for_model(model, modalities)
    if needs_router(router, layers):
        # Not twice, where it is attached already.
        router.detach(model)
        router.attach(model)
    return router
