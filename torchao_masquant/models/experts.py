# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Expert weights of mixture-of-experts models: where they are, and how they are laid out.

transformers holds the weights of all of a layer's experts in one parameter for each of
their two projections, in modules that its ``use_experts_implementation`` marks with
what the layout is. Those are quantized, see :mod:`torchao_masquant.expert_modules`;
others stay in high precision.
"""

import logging
import weakref
from dataclasses import dataclass
from typing import Iterable, Mapping, Optional, Union

import torch
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "PROJECTIONS",
    "ExpertWeight",
    "Layer",
    "by_module",
    "expert_weights",
    "experts_of",
    "layers_of_model",
    "module_of",
    "projections",
    "warn_of_expert_weights",
]

_LOGGER = logging.getLogger(__name__)

# Attributes by which modules of experts say how many there are.
_NUMBERS = ("num_experts", "num_local_experts")

#: What the parameters of experts of a known layout are called.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")

# Flags that transformers' decorator puts on a module of experts.
_LAYOUT = ("has_gate", "has_bias", "is_transposed")

_WARNED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(frozen=True)
class ExpertWeight:
    """One projection of all experts of a layer.

    Attributes:
        module: of the experts.
        parameter: its name in the module.
    """

    module: nn.Module
    parameter: str

    @property
    def weight(self) -> torch.Tensor:
        """(E, N, K), a view where the module has it as (E, K, N); quantized ones it has so."""
        weight = getattr(self.module, self.parameter).data
        if isinstance(weight, MASQuantTensor) or not self.module.is_transposed:
            return weight
        return weight.transpose(1, 2)

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[2]


#: A recipe has one part for each of these.
Layer = Union[nn.Linear, ExpertWeight]


def module_of(layer: Layer) -> nn.Module:
    """The linear itself, or the module of the experts."""
    return layer.module if isinstance(layer, ExpertWeight) else layer


def by_module(layers: Mapping[str, Layer]) -> dict[nn.Module, dict[str, Layer]]:
    """Each module to those of some layers, by name, that it holds."""
    modules: dict[nn.Module, dict[str, Layer]] = {}
    for name, layer in layers.items():
        modules.setdefault(module_of(layer), {})[name] = layer
    return modules


def layers_of_model(model: nn.Module) -> dict[str, Layer]:
    """All linears and experts of a known layout, quantized or not, by name."""
    linears: dict[str, Layer] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return linears | experts_of(model)


def projections(module: nn.Module) -> Optional[tuple[str, str]]:
    """Names of the parameters of a module of experts, in the order of their use.

    None where the module is no such, or of a layout that is not known.
    """
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _LAYOUT):
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = [getattr(module, name, None) for name in names]
    return names if all(p is not None and p.dim() == 3 for p in found) else None


def experts_of(model: nn.Module) -> dict[str, ExpertWeight]:
    """The weights of experts of a known layout, quantized or not.

    Returns:
        Name in ``model`` to weight.
    """
    return {
        f"{prefix}.{name}" if prefix else name: ExpertWeight(module, name)
        for prefix, module in model.named_modules()
        for name in projections(module) or ()
    }


def expert_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of experts that are held in one tensor for all of a layer's experts.

    Returns:
        Name in ``decoder`` to the parameter [experts, N, K] or [experts, K, N].
    """
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in decoder.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and parameter.shape[0] in [getattr(module, n, None) for n in _NUMBERS]
    }


def warn_of_expert_weights(decoder: nn.Module, known: Iterable[ExpertWeight]) -> None:
    """Say, once for a model, how many bytes the experts of an unknown layout keep.

    Args:
        decoder: of the model.
        known: its experts that can be quantized.
    """
    quantizable = {id(getattr(e.module, e.parameter)) for e in known}
    experts = {
        name: parameter
        for name, parameter in expert_weights(decoder).items()
        if id(parameter) not in quantizable
    }
    if not experts or decoder in _WARNED:
        return
    _WARNED.add(decoder)
    held = sum(p.nbytes for p in experts.values())
    everything = sum(p.nbytes for p in decoder.parameters())
    _LOGGER.warning(
        "the weights of the experts stay in high precision, %.1f %% of the decoder's "
        "bytes: %s and %d others hold all experts of a layer in one tensor, of a layout "
        "that is not marked by transformers' use_experts_implementation.",
        100 * held / everything,
        next(iter(experts)),
        len(experts) - 1,
    )
