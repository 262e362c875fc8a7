# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Observing the linears of a model, and quantizing them from what was observed."""

from functools import cached_property, partial
from typing import Mapping

import torch
from torch import nn

from torchao_masquant.calibration.left_out import warn_of_left_out
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conversion.changes import (
    Changes,
    modalities_of,
    needs_router,
    replace,
    replacing,
    selected_of,
)
from torchao_masquant.conversion.fitting import quantized_weight
from torchao_masquant.conversion.listeners import tell
from torchao_masquant.conversion.solution import OBSERVED, solution_of
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.models.experts import (
    ExpertWeight,
    Layer,
    by_module,
    layers_of_model,
)
from torchao_masquant.models.wrappers import check_in_memory, is_hooked
from torchao_masquant.options import QuantizationOptions, SolverOptions
from torchao_masquant.recipe import LayerRecipe, library_versions
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["plan_observed", "plan_prepare"]


def plan_prepare(model: nn.Module, asked: QuantizationOptions) -> Changes:
    """What makes linears and experts show their inputs to one session.

    Raises:
        ValueError: as :func:`selected_of`; a weight is never in memory.
    """
    if asked.options.procedure.folded:
        raise ValueError(
            f"target {asked.target!r} is for calibrate(), which looks where factors can "
            "be folded: calibrate, and convert with masquant_config(recipe)."
        )
    met = modalities_of(model, asked)
    second_moments = asked.options.procedure.per_modality
    observed = [m for m in model.modules() if isinstance(m, OBSERVED)]
    # One that has seen nothing yet may be that of a call that did not finish.
    session = next(
        (
            m.session
            for m in observed
            if not m.session.leaders
            and m.session.second_moments == second_moments
            and m.session.router.modalities == met
        ),
        None,
    )
    done = {m for m in observed if m.session is session}
    selected = selected_of(model, asked, done)
    if is_hooked(model):
        # Elsewhere values may still be loaded; these never are, but during calls.
        for name, weight in selected.weights.items():
            check_in_memory(name, weight, model)
    if session is None:
        # Another part of the model may be observed already, by another config.
        router = next((m.session.router for m in observed), None)
        if router is None or router.modalities != met:
            router = Router.for_model(model, met)
            router.skip_padding = True
            router.attach(model)
        session = CalibrationSession({}, router, second_moments)
    session.towers.update(selected.towers)
    return {
        module: partial(_observe, session, layers)
        for module, layers in by_module(selected.layers).items()
    }


def _observe(session: CalibrationSession, layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        if isinstance(layer, ExpertWeight):
            session.attach_experts(name, layer)
        else:
            session.attach_linear(name, layer)


def plan_observed(model: nn.Module, asked: QuantizationOptions) -> Changes:
    """What quantizes all that is observed.

    A session is solved for when the first of its modules is changed: where several have
    observed a model, the options may not be meant for all.
    """
    sessions = dict.fromkeys(
        m.session for m in model.modules() if isinstance(m, OBSERVED)
    )
    changes: Changes = {}
    for session in sessions:
        changes |= _Conversion(model, session, asked.options).changes()
        changes |= _head_changes(model, session.router, asked)
    return changes


def _head_changes(
    model: nn.Module, router: Router, asked: QuantizationOptions
) -> Changes:
    """What rounds the output head, where that is asked for and not done."""
    options, modalities = asked.options, router.modalities
    layers = head_layers(model, options, modalities, asked.exclude)
    held = layers_of_model(model)
    left = {
        name: held[name]
        for name in layers
        if not isinstance(held[name].weight.data, MASQuantTensor)
    }

    def quantized(name: str, weight: torch.Tensor) -> MASQuantTensor:
        return quantized_weight(name, weight, layers[name], options, modalities)

    return replacing(model, left, quantized, router)


class _Conversion:
    """What quantizes what one session observed."""

    def __init__(
        self, model: nn.Module, session: CalibrationSession, options: SolverOptions
    ):
        self.model, self.session, self.options = model, session, options

    def changes(self) -> Changes:
        layers: dict[str, Layer] = {**self.session.linears, **self.session.experts}
        return {
            module: partial(self._convert, module, own)
            for module, own in by_module(layers).items()
            if self._observes(module)
        }

    def _observes(self, module: nn.Module) -> bool:
        return isinstance(module, OBSERVED) and module.session is self.session

    @cached_property
    def _solution(self) -> dict[str, LayerRecipe]:
        """What was found, once all is checked; the model is made ready for it.

        Raises:
            ValueError: as :func:`solution_of`; a weight is not in memory.
        """
        for name, weight in self.session.weights.items():
            check_in_memory(name, weight, self.model)
        layers = solution_of(self.session, self.options)
        warn_of_left_out(self.session.not_matched)
        router = self.session.router
        router.detach(self.model)
        mine = {m for m in self.model.modules() if self._observes(m)}
        if needs_router(router, layers) or any(
            getattr(m, "router", None) is router and m not in mine
            for m in self.model.modules()
        ):
            router.attach(self.model)
        tell(self.model, mine, self.options, {"versions": library_versions()})
        return layers

    def _quantized(self, name: str, weight: torch.Tensor) -> MASQuantTensor:
        layer, modalities = self._solution[name], self.session.router.modalities
        return quantized_weight(name, weight, layer, self.options, modalities)

    def _convert(self, module: nn.Module, layers: Mapping[str, Layer]) -> None:
        is_solved = self._solution.keys() >= layers.keys()
        if isinstance(module, nn.Linear):
            self.session.detach_linear(module)
        else:
            self.session.detach_experts(module)
        if not is_solved:
            return
        router = self.session.router
        # From now on padding is base, as quantized linears want it.
        router.skip_padding = False
        try:
            replace(self.model, layers, self._quantized, router)
        except BaseException:
            # It is still to be converted, by the next call.
            _observe(self.session, layers)
            raise
