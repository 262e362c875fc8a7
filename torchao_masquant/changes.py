# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What changes the modules of a model, once all is checked; none has changed before.

A call may be interrupted between two changes. The next one like it chooses what is left.
"""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Collection, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.experts import Layer, by_module
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.modality import TEXT
from torchao_masquant.quantized_modules import (
    quantized_modules,
    quantized_weights,
    replace_weights,
)
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.selection import Patterns, Selected, select
from torchao_masquant.sharing import share_smoothing
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = [
    "Changes",
    "Choice",
    "made",
    "needs_router",
    "replace",
    "replacing",
]

#: Module to what changes it, in place.
Changes = dict[nn.Module, Callable[[], object]]

#: Makes the quantized weight of a name and a weight, (N, K) or (E, N, K).
Make = Callable[[str, torch.Tensor], MASQuantTensor]


@dataclass(frozen=True)
class Choice:
    """What of a model is quantized, and for which modalities.

    Attributes:
        base_modality: the one that the shared weight is smoothed for.
        modalities: those that the model will meet; None for all its config declares.
        include: patterns of names of linears and expert weights, in place of all of the
            decoder.
        exclude: patterns of names to leave out.
    """

    base_modality: str = TEXT
    modalities: Optional[Sequence[str]] = None
    include: Patterns = None
    exclude: Patterns = None

    def met(self, model: nn.Module) -> tuple[str, ...]:
        """The modalities, base first.

        Raises:
            ValueError, TypeError: as :func:`base_first`.
        """
        return base_first(model, self.base_modality, self.modalities)

    def selected(
        self, model: nn.Module, options: SolverOptions, done: Collection[nn.Module]
    ) -> Selected:
        """The linears and experts that are left by a call that did not finish.

        Args:
            model: to choose from.
            options: of the solution.
            done: modules that the call has been through.

        Raises:
            ValueError: as :func:`select`, which names a module where all are done, and
                as :func:`check_request`.
        """
        met = self.met(model)
        given = self.include, self.exclude, options, len(met)
        selected = select(model, *given, done)
        if done and not selected.weights:
            selected = select(model, *given)
        check_request(model, selected, met, options)
        return selected


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
        share_smoothing(model.get_submodule(module.fqn.rpartition(".")[0]))
    if next(module.parameters()).device.type == "cpu":
        cpu_lowering.prepare()


def needs_router(router: Router, layers: Mapping[str, LayerRecipe]) -> bool:
    """Whether a token's modality matters: to a linear, or to refuse it."""
    return not router.is_complete or any(
        layer.smoothing_factor.shape[0] > 1 for layer in layers.values()
    )
