# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What changes the modules of a model, once all is checked; none has changed before.

A call may be interrupted between two changes. The next one like it chooses what is left.
"""

from functools import partial
from typing import Callable, Collection, Mapping

import torch
from torch import nn

from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.conversion.quantized_modules import (
    quantized_modules,
    quantized_weights,
    replace_weights,
)
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.linear import share_smoothing
from torchao_masquant.models.experts import Layer, by_module
from torchao_masquant.models.output_head import stands_alone
from torchao_masquant.models.parts import head_of
from torchao_masquant.options import QuantizationOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.selection import Selected, select
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "Changes",
    "made",
    "modalities_of",
    "needs_router",
    "replace",
    "replacing",
    "selected_of",
]

#: Module to what changes it, in place.
Changes = dict[nn.Module, Callable[[], object]]

#: Makes the quantized weight of a name and a weight, (N, K) or (E, N, K).
Make = Callable[[str, torch.Tensor], MASQuantTensor]


def selected_of(
    model: nn.Module, asked: QuantizationOptions, done: Collection[nn.Module]
) -> Selected:
    """The linears and experts that are asked for, and not done yet.

    Args:
        model: to choose from.
        asked: what of it, and how it will be quantized.
        done: modules that a call has been through that did not finish.

    Raises:
        ValueError: as :func:`select`, which names a module where all are done, and as
            :func:`check_request`.
    """
    met, options = modalities_of(model, asked), asked.options
    given = asked.include, asked.exclude, options, len(met)
    selected = select(model, *given, done)
    if done and not selected.weights:
        selected = select(model, *given)
    check_request(model, selected, met, options)
    return selected


def modalities_of(model: nn.Module, asked: QuantizationOptions) -> tuple[str, ...]:
    """The modalities that are asked for, base first; see :func:`base_first`."""
    return base_first(model, asked.base_modality, asked.modalities)


def made(
    model: nn.Module, is_made: Callable[[str, MASQuantTensor], bool]
) -> set[nn.Module]:
    """The linears and experts all of whose weights are quantized in one way.

    Args:
        is_made: of the name of a linear, or of a projection of experts, and its weight.
    """
    return {
        module
        for name, module in quantized_modules(model).items()
        if all(
            is_made(name if parameter == "weight" else f"{name}.{parameter}", weight)
            for parameter, weight in quantized_weights(module).items()
        )
    }


def replacing(
    model: nn.Module, layers: Mapping[str, Layer], make: Make, router: Router
) -> Changes:
    """What gives linears and experts, which have these names, quantized weights."""
    return {
        module: partial(replace, model, own, make, router)
        for module, own in by_module(layers).items()
    }


def replace(
    model: nn.Module, layers: Mapping[str, Layer], make: Make, router: Router
) -> None:
    """Give one module quantized weights, all of it."""
    weights = {name: make(name, layer.weight.data) for name, layer in layers.items()}
    module = replace_weights(layers, weights, router)
    if isinstance(module, nn.Linear):
        if module is head_of(model):
            stands_alone(model, module.fqn)
        share_smoothing(model.get_submodule(module.fqn.rpartition(".")[0]))
    if next(module.parameters()).device.type == "cpu":
        cpu_lowering.prepare()


def needs_router(router: Router, layers: Mapping[str, LayerRecipe]) -> bool:
    """Whether a token's modality matters: to a linear, or to refuse it."""
    return not router.is_complete or any(
        layer.smoothing_factor.shape[0] > 1 for layer in layers.values()
    )
