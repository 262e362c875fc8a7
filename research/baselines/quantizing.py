# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model, what calibration saw of it, and copies of it quantized by every method."""

import copy
import dataclasses
from typing import Any, Mapping, Optional, Sequence

import torch
from baselines.control import ControlLinear
from baselines.gptq import gptq
from baselines.mbq import input_sensitivity
from baselines.mr_gptq import mr_gptq
from baselines.pooled import PooledLinear, pooled
from baselines.published import PublishedLinear
from baselines.search import searched_factor
from baselines.svdquant import svdquant
from baselines.unshared import UnsharedLinear
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantLinear, Recipe, masquant_config
from torchao_masquant.calibrate_in_memory import calibrate, learned_factors
from torchao_masquant.calibration.foldable import foldable_channels, showing_all
from torchao_masquant.calibration.sensitivity import modality_sensitivity
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.conductor import solve
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.learning import learn
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, library_versions
from torchao_masquant.routing import Router
from torchao_masquant.solver.layers import factors_alone, solve_group

__all__ = ["BASELINES", "Quantizing", "weight_bytes"]

#: Methods that the package has not.
BASELINES = (
    "control",
    "pooled",
    "gptq",
    "mr-gptq",
    "svdquant",
    "awq",
    "mbq",
    "mas-unshared",
    "authors",
)


class Quantizing:
    """Quantized copies of one model, all from the same calibration.

    Args:
        model: the dense one; stays as it is.
        session: that has seen the calibration data.
        samples: the calibration data, for methods that call the model again.
    """

    def __init__(
        self,
        model: nn.Module,
        session: CalibrationSession,
        samples: Sequence[Mapping[str, Any]],
    ):
        self.model: Any = model
        self.session = session
        self.samples = samples
        self.modalities = session.router.modalities
        self.groups = [
            ({n: session.linears[n].weight.data for n in names}, leader)
            for leader, names in session.groups().items()
        ]
        self._sensitivity: Optional[dict[str, list[float]]] = None
        self._of_modalities: Optional[dict[str, float]] = None
        self._learned: dict[str, dict[str, torch.Tensor]] = {}

    def sensitivity(self) -> dict[str, list[float]]:
        """Of each input, by leader; found once."""
        if self._sensitivity is None:
            self._sensitivity = input_sensitivity(
                self.model, self.samples, self.session.groups()
            )
        return self._sensitivity

    def published(self, options: SolverOptions) -> dict[str, LayerRecipe]:
        """Factors learned as published, and pairs for those; learned once a scheme."""
        if self._of_modalities is None:
            self._of_modalities = modality_sensitivity(
                self.model, self.samples, progress=False
            )
        options = dataclasses.replace(options, modality_weights=self._of_modalities)
        if options.scheme not in self._learned:
            self._learned[options.scheme] = learned_factors(
                self.model, self.samples, self.session, options
            )
        return solve(self.session, options, factors=self._learned[options.scheme])

    def by_options(self, scheme: str, given: Mapping[str, Any]) -> nn.Module:
        """A copy quantized by the package, with these options."""
        options = SolverOptions(scheme=scheme, **given)
        if options.asymmetric_calibration:
            # It asks for calls of the model behind what is quantized.
            recipe = calibrate(
                self.model, self.samples, scheme=scheme, progress=False, **given
            )
            return self._convert(options, recipe.layers)
        heads = head_layers(self.model, options, self.modalities)
        if options.learns_factors:
            return self._convert(options, self.published(options) | heads)
        foldable = None
        if options.procedure.folded:
            router = self.session.router
            shown, _ = showing_all(self.samples, router)
            foldable = foldable_channels(
                self.model, self.session.linears, shown, router
            )
        layers = solve(
            self.session, dataclasses.replace(options, epochs=0), foldable=foldable
        )
        if options.epochs:
            router = Router.for_model(self.model)
            router.skip_padding = True
            layers = learn(self.model, self.samples, layers, router, options)
        return self._convert(options, layers | heads)

    def by_baseline(
        self, scheme: str, method: str, given: Mapping[str, Any]
    ) -> nn.Module:
        """A copy quantized by one of ``BASELINES``.

        Args:
            given: options of "masquant" for "pooled"; ``rank`` for "control" too;
                ``group_size`` for all.
        """
        options = SolverOptions(
            scheme=scheme, method="smoothquant", group_size=given.get("group_size")
        )
        if method in ("gptq", "mr-gptq", "awq", "mbq"):
            return self._convert(options, self._one_factor(method, options))
        quantized = copy.deepcopy(self.model)
        router = Router.for_model(quantized)
        modules = self._modules(method, options, given, router)
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(quantized.get_submodule(parent), child, module)
        router.attach(quantized)
        return quantized

    def _one_factor(
        self, method: str, options: SolverOptions
    ) -> dict[str, LayerRecipe]:
        """What a baseline finds that the package's own linears can run."""
        layers: dict[str, LayerRecipe] = {}
        bits = options.number_format
        for weights, leader in self.groups:
            seen = self.session.statistics[leader]
            if method == "mr-gptq":
                layers |= mr_gptq(weights, seen, bits)
            elif method == "gptq":
                smoothquant = solve_group(weights, seen, options)
                layers |= gptq(weights, seen, smoothquant, bits)
            else:
                balance = self.sensitivity()[leader] if method == "mbq" else None
                layers |= searched_factor(weights, seen, bits, balance)
        return layers

    def _modules(
        self,
        method: str,
        options: SolverOptions,
        given: Mapping[str, Any],
        router: Router,
    ) -> dict[str, nn.Module]:
        """Linears of a baseline that the package's own cannot be."""
        scheme, bits = options.scheme, options.number_format
        linears, found = self.session.linears, {}
        if method == "authors":
            authors = SolverOptions(scheme, "masquant-paper", epochs=2, **given)
            found = self.published(authors)
        modules: dict[str, nn.Module] = {}
        for weights, leader in self.groups:
            seen = self.session.statistics[leader]
            if method == "pooled":
                layers = pooled(weights, seen, SolverOptions(scheme=scheme, **given))
                for name, layer in layers.items():
                    modules[name] = PooledLinear(linears[name], layer, bits)
            elif method == "svdquant":
                own_linears = [linears[name] for name in weights]
                modules |= zip(weights, svdquant(own_linears, seen, bits))
            elif method == "mas-unshared":
                own = SolverOptions(scheme=scheme, alpha=0.5, separation=1.0)
                for name, layer in factors_alone(weights, seen, own).items():
                    modules[name] = UnsharedLinear(
                        name, linears[name], layer.smoothing_factor, bits, router
                    )
            elif method == "authors":
                for name in weights:
                    modules[name] = PublishedLinear(
                        name, linears[name], found[name], bits, self.modalities, router
                    )
            else:
                for name, layer in solve_group(weights, seen, options).items():
                    modules[name] = ControlLinear(
                        linears[name], layer, seen, bits, given["rank"]
                    )
        return modules

    def _convert(
        self, options: SolverOptions, layers: dict[str, LayerRecipe]
    ) -> nn.Module:
        recipe = Recipe(options, self.modalities, layers, library_versions())
        quantized = copy.deepcopy(self.model)
        quantize_(quantized, masquant_config(recipe))
        return quantized


def weight_bytes(module: Any) -> int:
    """Of one quantized linear, factors, pairs and biases of modalities included."""
    if isinstance(module, MASQuantLinear):
        return module.weight.nbytes_stored
    return module.nbytes_stored
