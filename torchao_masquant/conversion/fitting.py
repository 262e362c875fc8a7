# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whether a recipe was made for a model, and what its parts make of the weights."""

from typing import Sequence

import torch
from torch import nn

from torchao_masquant.models.experts import experts_of, layers_of_model
from torchao_masquant.models.names import named_here
from torchao_masquant.options import NamePatterns, SolverOptions
from torchao_masquant.recipe import LayerRecipe, Recipe, weight_fingerprint
from torchao_masquant.selection import check_whole, match_names
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["check_fingerprint", "fitting_layers", "quantized_weight"]

_AGAIN = "use the model that it was made for, in the same dtype, or calibrate again"


def fitting_layers(
    model: nn.Module,
    recipe: Recipe,
    include: NamePatterns = None,
    exclude: NamePatterns = None,
) -> dict[str, LayerRecipe]:
    """The parts of a recipe that patterns leave, by the names that they have in a model.

    Args:
        model: on any device, quantized or not.
        recipe: that may have been made with another class or release of transformers.
        include: patterns of those to take; None for all.
        exclude: patterns of those to leave out.

    Raises:
        ValueError: the recipe was made for another model, as far as names and shapes
            tell; a pattern matches nothing; one projection of experts is left out.
    """
    saved = named_here(model, recipe.layers)
    layers = {n: saved[n] for n in match_names(list(saved), include, exclude)}
    known = layers_of_model(model)
    for name, layer in layers.items():
        if name not in known:
            kind = "linear " if len(layer.shape) == 2 else ""
            raise ValueError(
                f"the recipe was made for another model: this one has no {kind}{name}; "
                f"{_AGAIN}."
            )
        shape = tuple(known[name].weight.shape)
        if shape != tuple(layer.shape):
            raise ValueError(
                f"{name}: the recipe was made for a weight of shape "
                f"{tuple(layer.shape)}, the model's is {shape}; {_AGAIN}."
            )
    check_whole(list(layers), experts_of(model))
    return layers


def quantized_weight(
    name: str,
    weight: torch.Tensor,
    layer: LayerRecipe,
    options: SolverOptions,
    modalities: Sequence[str],
) -> MASQuantTensor:
    """The quantized weight of a linear, or of a projection of experts.

    Args:
        name: of it, for the message.
        weight: (N, K) or (E, N, K) floating point.
        layer: made for this weight.
        options: of the recipe.
        modalities: names, base first.

    Raises:
        ValueError: the weight does not fit the scheme or the recipe; names it.
    """
    try:
        return layer.quantize(
            weight, options.number_format, modalities, options.low_rank_bits
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_fingerprint(name: str, weight: torch.Tensor, layer: LayerRecipe) -> None:
    """Raise unless a recipe's layer was made for the values of a weight, or for any.

    Raises:
        ValueError: names it.
    """
    found = weight_fingerprint(weight) if layer.fingerprint else ""
    if found != layer.fingerprint:
        raise ValueError(
            f"{name}: the recipe was made for a weight with fingerprint "
            f"{layer.fingerprint}, the model's is {found}; {_AGAIN}."
        )
