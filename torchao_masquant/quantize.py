# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe does to a model, and what torchao's steps do.

:func:`apply_recipe`, :func:`prepare`, :func:`convert` and :func:`prepare_for_loading` change
a whole model. Each has a plan, which checks all that can be checked and returns what
changes each module: ``quantize_`` runs that for the modules that it was told to change.
"""

from typing import Sequence

import torch
from torch import nn

from torchao_masquant.conversion.changes import (
    Changes,
    made,
    modalities_of,
    needs_router,
    replacing,
    selected_of,
)
from torchao_masquant.conversion.fitting import (
    check_fingerprint,
    fitting_layers,
    quantized_weight,
)
from torchao_masquant.conversion.listeners import tell
from torchao_masquant.conversion.observing import plan_observed, plan_prepare
from torchao_masquant.conversion.placeholders import (
    placeholder_of,
    placeholder_weight,
)
from torchao_masquant.conversion.solution import OBSERVED
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.models.experts import layers_of_model
from torchao_masquant.models.wrappers import check_in_memory, unwrapped
from torchao_masquant.options import NamePatterns, QuantizationOptions
from torchao_masquant.recipe import LayerRecipe, Recipe, library_versions
from torchao_masquant.routing import Router, router_of
from torchao_masquant.selection import check_plain, towers_asked_for
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "apply_recipe",
    "convert",
    "plan_convert",
    "plan_loading",
    "plan_prepare",
    "plan_recipe",
    "prepare",
    "prepare_for_loading",
    "rounding_recipe",
]


def apply_recipe(
    model: nn.Module,
    recipe: Recipe,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
) -> None:
    """Quantize the linears and experts that a recipe was made for, in place.

    Args:
        model: that the recipe was made for, its weights in memory.
        recipe: of ``calibrate``.
        include: patterns of names that narrow the recipe's linears down.
        exclude: patterns of names to leave out.

    Raises:
        ValueError: the recipe was made for other weights, all of them are quantized
            already, or a pattern matches nothing.
    """
    _run(plan_recipe(unwrapped(model), recipe, include, exclude))


def prepare(model: nn.Module, asked: QuantizationOptions) -> None:
    """Observe the inputs of a model's linears and experts, until :func:`convert`.

    Args:
        model: changed in place; it answers as before.
        asked: what is observed, and how it will be quantized.

    Raises:
        ValueError: as :func:`~torchao_masquant.selection.select`, and as
            :func:`~torchao_masquant.calibration.request.check_request`.
    """
    _run(plan_prepare(unwrapped(model), asked))


def convert(model: nn.Module, asked: QuantizationOptions) -> None:
    """Quantize all that :func:`prepare` left, from what it has observed since.

    Args:
        model: changed in place.
        asked: how it is quantized; and what is, where the method needs no data and the
            model was not prepared.

    Raises:
        ValueError: nothing was observed, or too little; as :func:`prepare`.
    """
    _run(plan_convert(unwrapped(model), asked))


def prepare_for_loading(model: nn.Module, asked: QuantizationOptions) -> None:
    """Give a model quantized weights of zeros, to load a quantized state_dict into.

    Args:
        model: changed in place, on any device, also on meta.
        asked: what the state_dict was made with, where it is loaded in place.

    Raises:
        ValueError: as :func:`prepare`.
    """
    _run(plan_loading(unwrapped(model), asked))


def _run(changes: Changes) -> None:
    for change in changes.values():
        change()


def plan_recipe(
    model: nn.Module,
    recipe: Recipe,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
) -> Changes:
    """See :func:`apply_recipe`."""
    options, modalities = recipe.options, recipe.modalities
    layers, held = (
        fitting_layers(model, recipe, include, exclude),
        layers_of_model(model),
    )
    # A call that did not finish may have been there.
    left = {
        name: layer
        for name, layer in layers.items()
        if not layer.made(
            held[name].weight.data,
            options.number_format,
            modalities,
            options.low_rank_bits,
        )
    }
    # Where nothing is left, the first one says so.
    for name, layer in (left or layers).items():
        weight = held[name].weight.data
        if isinstance(weight, MASQuantTensor):
            raise ValueError(f"{name} is quantized already.")
        check_plain(name, held[name])
        check_in_memory(name, weight, model)
        check_fingerprint(name, weight, layer)
    router = router_of(model) or Router.for_model(model, modalities)
    if router.modalities != modalities:
        raise ValueError(
            f"linears of the model are quantized for the modalities "
            f"{router.modalities} already, the recipe is for {modalities}."
        )
    if needs_router(router, left):
        # Anew: it may be attached to a part of the model, which is deeper inside now.
        router.detach(model)
        router.attach(model)

    def quantized(name: str, weight: torch.Tensor) -> MASQuantTensor:
        return quantized_weight(name, weight, left[name], options, modalities)

    changes = replacing(model, {n: held[n] for n in left}, quantized, router)
    tell(model, changes, options, recipe.provenance)
    return changes


def rounding_recipe(model: nn.Module, asked: QuantizationOptions) -> Recipe:
    """The recipe of a method that needs no data, for what is not rounded so already.

    Args:
        model: on any device.
        asked: what is rounded, and how.

    Raises:
        ValueError: as :func:`prepare`.
    """
    met, options = modalities_of(model, asked), asked.options
    towers = towers_asked_for(model, asked.include, options)

    def rounded(name: str, shape: Sequence[int]) -> LayerRecipe:
        if name not in towers:
            return LayerRecipe.rounded(shape)
        own = (towers[name],)
        return LayerRecipe.rounded(shape, scheme=options.towers, modalities=own)

    def is_made(name: str, weight: MASQuantTensor) -> bool:
        return rounded(name, weight.shape).made(weight, options.number_format, met)

    selected = selected_of(model, asked, made(model, is_made))
    layers = {n: rounded(n, w.shape) for n, w in selected.weights.items()}
    layers |= head_layers(model, options, met, asked.exclude)
    return Recipe(options, met, layers, library_versions())


def plan_convert(model: nn.Module, asked: QuantizationOptions) -> Changes:
    """See :func:`convert`."""
    if any(isinstance(module, OBSERVED) for module in model.modules()):
        return plan_observed(model, asked)
    if not asked.options.procedure.smooth:
        return plan_recipe(model, rounding_recipe(model, asked))
    raise ValueError(
        f"{type(model).__name__} has no observed linear to convert: call "
        "quantize_(model, MASQuantConfig(step='prepare', ...)) and run calibration "
        "data first, or give a recipe; method='rtn' needs neither."
    )


def plan_loading(model: nn.Module, asked: QuantizationOptions) -> Changes:
    """See :func:`prepare_for_loading`."""
    met, options = modalities_of(model, asked), asked.options
    towers = towers_asked_for(model, asked.include, options)

    def placeholder(name: str, weight: torch.Tensor) -> MASQuantTensor:
        if name in towers:
            own = (towers[name],)
            return placeholder_weight(name, weight, options.of_towers, own)
        return placeholder_weight(name, weight, options, met)

    def is_made(name: str, weight: MASQuantTensor) -> bool:
        return weight.same_layout(placeholder(name, weight))

    selected = selected_of(model, asked, made(model, is_made))
    # Another part of the model may be made ready already, by another config, which may
    # not have needed it.
    router = router_of(model)
    if router is None or router.modalities != met:
        router = Router.for_model(model, met)
    router.detach(model)
    router.attach(model)
    tell(model)
    heads = head_layers(model, options, met, asked.exclude)
    head = {n: layer for n, layer in layers_of_model(model).items() if n in heads}

    def head_placeholder(name: str, weight: torch.Tensor) -> MASQuantTensor:
        return placeholder_of(heads[name], weight, options, met)

    return {
        **replacing(model, selected.layers, placeholder, router),
        **replacing(model, head, head_placeholder, router),
    }
