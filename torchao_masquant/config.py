# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The torchao config of MASQuant, and what ``quantize_`` does with it."""

import dataclasses
import os
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch
from torch import nn
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.quant_api import _is_linear
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_masquant.calibration.calibrate import solve
from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.calibration.session import (
    CalibrationSession,
    MASQuantObservedLinear,
)
from torchao_masquant.convert import (
    convert_experts,
    convert_linear,
    placeholder_experts,
    placeholder_weight,
)
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight, experts_of
from torchao_masquant.integrations.attachment import attach_to_transformers
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.modality import TEXT
from torchao_masquant.recipe import LayerRecipe, Recipe, weight_fingerprint
from torchao_masquant.routing import Router, router_of
from torchao_masquant.selection import Patterns, check_whole, match_names, select
from torchao_masquant.sharing import share_smoothing
from torchao_masquant.solver.methods import SolverOptions

__all__ = ["MASQuantConfig", "masquant_config"]

_STEPS = (
    QuantizationStep.PREPARE,
    QuantizationStep.CONVERT,
    QuantizationStep.PREPARE_FOR_LOADING,
)


# eq=False: two configs are the same only if they are one, so that what is planned for
# one can be kept under it.
@dataclass(eq=False)
class MASQuantConfig(AOBaseConfig):
    """
    Configuration for MASQuant when passed into quantize_()

    With a recipe (see ``masquant_config``) one call quantizes the model. Without one,
    calibrate in torchao's steps::

        quantize_(model, MASQuantConfig(step="prepare", scheme="w4a8"))
        for sample in samples:
            model(**sample)
        quantize_(model, MASQuantConfig(step="convert", scheme="w4a8"))

    Each step is checked for the whole model before its first linear is changed.

    ``quantize_`` hands linears over, unless its ``filter_fn`` says otherwise; the experts
    of a mixture, whose weights are no linears, are quantized together with the first of
    them. A ``filter_fn`` of the caller's own, and ``FqnToConfig``, choose experts as they
    choose linears: by the module.

    Args:
        step: "prepare" (observe the linears), "convert" (quantize them), or
            "prepare_for_loading" (give the linears quantized weights of zeros, to load
            a quantized state_dict into, with ``assign=True``).
        scheme: "w8a8", "w4a8", "w4a6", "w4a4", "w4a16" or "w3a3".
        method: "masquant", "masquant-paper", "smoothquant" or "rtn".
        alpha: 0..1, exponent of the activations in the smoothing factor, or "auto".
        separation: 0..1 or "auto", see :func:`~torchao_masquant.calibrate`.
        rank: of each modality's low-rank pair, an int, or a float, the share of
            ``min(N, K)``, or "auto".
        group_size: of the weight, in place of the scheme's.
        shift: see there, as the four below.
        rounding: "gptq" or "nearest".
        clip: search the part of the weight's range that its scales are made for.
        low_rank_bits: 16 or 8.
        modality_weights: name of a modality to what its error weighs.
        epochs: of learning; only a recipe from ``calibrate`` has learned anything.
        lr: its learning rate.
        batch_size: samples of one of its steps.
        base_modality: the one that the shared weight is smoothed for.
        modalities: those that the model will meet; None for all its config declares.
        include: patterns of names of linears and expert weights, in place of all of the
            decoder.
        exclude: patterns of names to leave out.
        recipe: what ``calibrate`` found, or the path of one; its options take the
            place of those above. Only a path can be written to JSON
            (``torchao.core.config.config_to_dict``).

    Raises:
        ValueError: an option is out of range, or a recipe meets another step.
        FileNotFoundError: there is no recipe at the path.
    """

    step: Union[str, QuantizationStep]
    scheme: str = "w4a8"
    method: str = "masquant"
    alpha: Union[float, str, None] = None
    separation: Union[float, str, None] = None
    rank: Union[int, float, str] = 0.05
    group_size: Optional[int] = None
    shift: Optional[bool] = None
    rounding: Optional[str] = None
    clip: Optional[bool] = None
    low_rank_bits: int = 16
    modality_weights: Optional[Mapping[str, float]] = None
    epochs: int = 0
    lr: float = 3e-4
    batch_size: int = 1
    base_modality: str = TEXT
    modalities: Optional[Sequence[str]] = None
    include: Patterns = None
    exclude: Patterns = None
    recipe: Optional[Union[Recipe, str, os.PathLike]] = None

    def __post_init__(self) -> None:
        names = [step.value for step in _STEPS]
        step = self.step.value if isinstance(self.step, QuantizationStep) else self.step
        if str(step).lower() not in names:
            raise ValueError(f"unknown step {self.step!r}: choose one of {names}.")
        self.step = str(step).lower()
        if self.recipe is not None:
            if self.step != QuantizationStep.CONVERT:
                raise ValueError(
                    f"a recipe is for step='convert', not for step={self.step!r}."
                )
            if isinstance(self.recipe, Recipe):
                recipe = self.recipe
            else:
                self.recipe = os.fspath(self.recipe)
                recipe = Recipe.load(self.recipe)
            # torchao leaves what begins with an underscore out of its JSON.
            self._loaded_recipe = recipe
            for name, value in vars(recipe.options).items():
                setattr(self, name, value)
            self.modalities = recipe.modalities
            self.base_modality = recipe.modalities[0]
        if self.modalities is not None and not isinstance(self.modalities, str):
            # What torchao writes to JSON; it refuses tuples.
            self.modalities = list(self.modalities)
        self.options  # noqa: B018 -- checks them
        if self.recipe is None and self.epochs:
            raise ValueError(
                "learning needs the samples: call calibrate(model, samples, epochs=...) "
                "and quantize with its recipe."
            )

    @property
    def loaded_recipe(self) -> Optional[Recipe]:
        """The recipe itself, where ``recipe`` may be its path."""
        return getattr(self, "_loaded_recipe", None)

    @property
    def options(self) -> SolverOptions:
        """Options of the solution."""
        names = [field.name for field in dataclasses.fields(SolverOptions)]
        return SolverOptions(**{name: getattr(self, name) for name in names})


# A config is named in checkpoints by its class alone, looked up in these modules; one of
# its own, since torchao calls whatever has the name.
ALLOWED_AO_MODULES.add("torchao_masquant.integrations.torchao_config")


def masquant_config(
    recipe: Union[Recipe, str, os.PathLike], **overrides: Any
) -> MASQuantConfig:
    """The config that quantizes a model as a recipe says::

        quantize_(model, masquant_config(recipe))

    Args:
        recipe: from ``calibrate``, or the path of a saved one.
        **overrides: ``include`` and ``exclude``, patterns of names that narrow the
            recipe's linears down.

    Raises:
        TypeError: an option that the recipe has fixed.
        FileNotFoundError: there is no recipe at the path.
        ValueError: the file is no recipe.
    """
    fixed = sorted(set(overrides) - {"include", "exclude"})
    if fixed:
        raise TypeError(
            f"masquant_config takes include and exclude beside the recipe, not "
            f"{', '.join(fixed)}: what else there is, the recipe was made for; "
            "calibrate again to change it."
        )
    if not isinstance(recipe, (Recipe, str, os.PathLike)):
        raise TypeError(
            "masquant_config takes a recipe from calibrate(), or the path of one, got "
            f"a {type(recipe).__name__}."
        )
    return MASQuantConfig(step="convert", recipe=recipe, **overrides)


class _Plan:
    """What one config will do to the linears of one model, checked beforehand."""

    def __init__(
        self, model: nn.Module, actions: dict[nn.Module, Callable[[], object]]
    ):
        self.parents = weakref.WeakKeyDictionary(
            {child: parent for parent in model.modules() for child in parent.children()}
        )
        self.actions: dict[nn.Module, Callable[[], object]] = {}
        self.targets: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.add(actions)

    def add(self, actions: dict[nn.Module, Callable[[], object]]) -> None:
        self.actions |= actions
        self.targets.update(actions)

    def apply(self, module: nn.Module) -> None:
        # Taken out before it runs, not to be run twice.
        action = self.actions.pop(module, None)
        if action is not None:
            action()

    def is_stale(self, module: nn.Module) -> bool:
        """Whether a module has come back as it was before this plan changed it."""
        return (
            module in self.targets
            and module not in self.actions
            and type(module) is nn.Linear
        )


_PLANS: "weakref.WeakKeyDictionary[MASQuantConfig, weakref.WeakKeyDictionary]" = (
    weakref.WeakKeyDictionary()
)


@register_quantize_module_handler(MASQuantConfig)
def _masquant_transform(module: nn.Module, config: MASQuantConfig) -> nn.Module:
    model = _model_in_quantize()
    plans = _PLANS.setdefault(config, weakref.WeakKeyDictionary())
    plan = plans.get(model)
    if plan is None or plan.is_stale(module):
        plan = plans[model] = _Plan(model, _plan(model, config, module))
        _attach(model, config, plan)
    elif (
        config.step == QuantizationStep.CONVERT
        and isinstance(module, _OBSERVED)
        and module not in plan.targets
    ):
        # Observed by another "prepare" step than those before it.
        plan.add(_plan_observed(model, config, module.session))
        _attach(model, config, plan)
    plan.apply(module)
    if _hands_over_linears_alone():
        _transform_experts(model, config, plan)
    if config.step != QuantizationStep.PREPARE and isinstance(
        module, (MASQuantLinear, MASQuantExperts)
    ):
        share_smoothing(plan.parents.get(module, module))
        if next(module.parameters()).device.type == "cpu":
            cpu_lowering.prepare()
    return module


def _transform_experts(model: nn.Module, config: MASQuantConfig, plan: _Plan) -> None:
    """Do what is planned for experts, which are not handed over one by one."""
    if config.step == QuantizationStep.CONVERT:
        for module in model.modules():
            if (
                isinstance(module, MASQuantObservedExperts)
                and module not in plan.targets
            ):
                plan.add(_plan_observed(model, config, module.session))
                _attach(model, config, plan)
    for module in [m for m in plan.actions if not isinstance(m, nn.Linear)]:
        plan.apply(module)


# What a "prepare" step leaves.
_OBSERVED = (MASQuantObservedLinear, MASQuantObservedExperts)


def _attach(model: nn.Module, config: MASQuantConfig, plan: _Plan) -> None:
    """Let a transformers model that is being quantized save itself."""
    if config.step == QuantizationStep.CONVERT:
        attach_to_transformers(model, plan.targets, config.options)
    elif config.step == QuantizationStep.PREPARE_FOR_LOADING:
        attach_to_transformers(model)


def _model_in_quantize() -> nn.Module:
    """The model that ``quantize_`` was called with.

    A handler is given one linear at a time, without the model or the linear's name.
    MASQuant needs both: calls are routed at the model, a recipe goes by names, and
    nothing may change before everything is checked. So it looks at its caller.
    """
    model = _quantize_locals()["model"]
    return getattr(model, "_orig_mod", model)


def _hands_over_linears_alone() -> bool:
    """Whether ``quantize_`` was called without a choice of modules by its caller."""
    given = _quantize_locals()
    return (
        isinstance(given["config"], MASQuantConfig) and given["filter_fn"] is _is_linear
    )


def _quantize_locals() -> Mapping[str, Any]:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is quantize_.__code__:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        "MASQuantConfig works through torchao.quantization.quantize_(model, config) "
        "only, since it needs the whole model."
    )


def _plan(
    model: nn.Module, config: MASQuantConfig, module: nn.Module
) -> dict[nn.Module, Callable[[], object]]:
    if config.step == QuantizationStep.PREPARE:
        return _plan_prepare(model, config)
    if config.step == QuantizationStep.PREPARE_FOR_LOADING:
        return _plan_loading(model, config)
    if config.loaded_recipe is not None:
        return _plan_recipe(model, config, config.loaded_recipe)
    observed = [m for m in model.modules() if isinstance(m, _OBSERVED)]
    if not observed:
        raise ValueError(
            f"{type(model).__name__} has no observed linear to convert: call "
            "quantize_(model, MASQuantConfig(step='prepare', ...)) and run calibration "
            "data first, or give a recipe."
        )
    first = module if isinstance(module, _OBSERVED) else observed[0]
    return _plan_observed(model, config, first.session)


def _plan_prepare(
    model: nn.Module, config: MASQuantConfig
) -> dict[nn.Module, Callable[[], object]]:
    selected = select(model, config.include, config.exclude)
    modalities = base_first(model, config.base_modality, config.modalities)
    check_request(model, selected, modalities, config.options)
    # Another part of the model may be observed already, by another config.
    router = next((m.router for m in model.modules() if isinstance(m, _OBSERVED)), None)
    if router is None or router.modalities != modalities:
        router = Router.for_model(model, modalities)
        router.skip_padding = True
        router.attach(model)
    session = CalibrationSession({}, router, config.options.parts.per_modality)
    actions: dict[nn.Module, Callable[[], object]] = {
        linear: partial(session.attach_linear, name, linear)
        for name, linear in selected.linears.items()
    }
    for experts, weights in _by_module(selected.experts).items():
        actions[experts] = partial(_observe_experts, session, weights)
    return actions


def _by_module(
    experts: Mapping[str, ExpertWeight],
) -> dict[nn.Module, dict[str, ExpertWeight]]:
    """Module to its weights of experts by their names in the model."""
    modules: dict[nn.Module, dict[str, ExpertWeight]] = {}
    for name, weight in experts.items():
        modules.setdefault(weight.module, {})[name] = weight
    return modules


def _observe_experts(
    session: CalibrationSession, weights: Mapping[str, ExpertWeight]
) -> None:
    for name, weight in weights.items():
        session.attach_experts(name, weight)


def _plan_observed(
    model: nn.Module, config: MASQuantConfig, session: CalibrationSession
) -> dict[nn.Module, Callable[[], object]]:
    if config.options.parts.per_modality and not session.second_moments:
        raise ValueError(
            f"method {config.method!r} needs covariances that step 'prepare' was not "
            "told to keep: give both steps the same method."
        )
    layers = solve(session, config.options, progress=True)
    router = session.router
    router.detach(model)
    experts = _by_module(session.experts)
    mine = {*session.linears.values(), *experts}
    if _needs_router(router, layers) or any(
        getattr(m, "router", None) is router and m not in mine for m in model.modules()
    ):
        router.attach(model)
    actions: dict[nn.Module, Callable[[], object]] = {
        linear: partial(_convert_observed, session, name, layers[name], config, router)
        for name, linear in session.linears.items()
    }
    for module, weights in experts.items():
        convert = _conversion_of_experts(
            module, {n: layers[n] for n in weights}, weights, config, router
        )
        actions[module] = partial(_convert_observed_experts, session, module, convert)
    return actions


def _convert_observed_experts(
    session: CalibrationSession, experts: nn.Module, convert: Callable[[], object]
) -> None:
    # As for linears.
    session.router.skip_padding = False
    session.detach_experts(experts)
    convert()


def _conversion_of_experts(
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
        config.options.bits,
        router.modalities,
        router,
        config.options.low_rank_bits,
    )


def _convert_observed(
    session: CalibrationSession,
    name: str,
    layer: LayerRecipe,
    config: MASQuantConfig,
    router: Router,
) -> None:
    linear = session.linears[name]
    # From now on padding is base, as quantized linears want it.
    router.skip_padding = False
    session.detach_linear(linear)
    convert_linear(
        linear,
        name,
        layer,
        config.options.bits,
        router.modalities,
        router,
        config.options.low_rank_bits,
    )


def _plan_recipe(
    model: nn.Module, config: MASQuantConfig, recipe: Recipe
) -> dict[nn.Module, Callable[[], object]]:
    modules = dict(model.named_modules())
    names = match_names(list(recipe.layers), config.include, config.exclude)
    layers = {name: recipe.layers[name] for name in names}
    experts = experts_of(model)
    for name, layer in layers.items():
        if len(layer.shape) == 3:
            _check_experts(experts.get(name), name, layer)
        else:
            _check_layer(modules.get(name), name, layer)
    check_whole(names, experts)
    router = _router_for(model, recipe.modalities, layers)
    chosen = _by_module({name: w for name, w in experts.items() if name in layers})
    return {
        modules[name]: partial(
            convert_linear,
            modules[name],
            name,
            layer,
            config.options.bits,
            recipe.modalities,
            router,
            config.options.low_rank_bits,
        )
        for name, layer in layers.items()
        if len(layer.shape) == 2
    } | {
        module: _conversion_of_experts(
            module, {name: layers[name] for name in weights}, weights, config, router
        )
        for module, weights in chosen.items()
    }


_AGAIN = "use the model that it was made for, or calibrate again"


def _check_experts(
    weight: Optional[ExpertWeight], name: str, layer: LayerRecipe
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
    _check_values(weight.weight, name, layer)


def _check_layer(module: Optional[nn.Module], name: str, layer: LayerRecipe) -> None:
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
    _check_values(module.weight, name, layer)


def _check_values(weight: torch.Tensor, name: str, layer: LayerRecipe) -> None:
    """Raise unless a recipe's layer was made for this weight."""
    if tuple(weight.shape) != tuple(layer.shape):
        raise ValueError(
            f"{name}: the recipe was made for a weight of shape {tuple(layer.shape)}, "
            f"the model's is {tuple(weight.shape)}; {_AGAIN}."
        )
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device, without values to quantize: load the "
            "model's weights first."
        )
    fingerprint = weight_fingerprint(weight)
    if fingerprint != layer.fingerprint:
        raise ValueError(
            f"{name}: the recipe was made for a weight with fingerprint "
            f"{layer.fingerprint}, the model's is {fingerprint}; {_AGAIN}."
        )


def _needs_router(router: Router, layers: dict[str, LayerRecipe]) -> bool:
    """Whether a token's modality matters: to a linear, or to refuse it."""
    return not router.is_complete or any(
        layer.smoothing_factor.shape[0] > 1 for layer in layers.values()
    )


def _router_for(
    model: nn.Module, modalities: tuple[str, ...], layers: dict[str, LayerRecipe]
) -> Router:
    """The model's router, attached to it where it is needed."""
    router = router_of(model)
    if router is not None:
        if router.modalities != modalities:
            raise ValueError(
                f"linears of the model are quantized for the modalities "
                f"{router.modalities} already, the recipe is for {modalities}."
            )
    else:
        router = Router.for_model(model, modalities)
    if _needs_router(router, layers):
        # Not twice, where it is attached already.
        router.detach(model)
        router.attach(model)
    return router


def _plan_loading(
    model: nn.Module, config: MASQuantConfig
) -> dict[nn.Module, Callable[[], object]]:
    selected = select(model, config.include, config.exclude)
    modalities = base_first(model, config.base_modality, config.modalities)
    # Another part of the model may be made ready already, by another config.
    router = router_of(model)
    if router is None or router.modalities != modalities:
        router = Router.for_model(model, modalities)
    # The other part may not have needed it. Not twice, where it is attached already.
    router.detach(model)
    router.attach(model)

    def load(name: str, linear: nn.Linear) -> None:
        weight = placeholder_weight(linear, config.options.bits, modalities)
        MASQuantLinear.from_float(linear, weight, name, router)

    def load_experts(experts: nn.Module, weights: Mapping[str, ExpertWeight]) -> None:
        zeros = {
            w.parameter: placeholder_experts(w, config.options.bits, modalities)
            for w in weights.values()
        }
        name, weight = next(iter(weights.items()))
        fqn = name.removesuffix(f".{weight.parameter}")
        MASQuantExperts.from_float(experts, zeros, fqn, router)

    return {
        linear: partial(load, name, linear) for name, linear in selected.linears.items()
    } | {
        experts: partial(load_experts, experts, weights)
        for experts, weights in _by_module(selected.experts).items()
    }
