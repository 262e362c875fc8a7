# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``quantize_`` does with a MASQuantConfig."""

from typing import Optional

from torch import nn
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_masquant.calibration.observed_experts import MASQuantObservedExperts
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.integrations.attachment import attach_to_transformers
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.sharing import share_smoothing
from torchao_masquant.steps.actions import Actions
from torchao_masquant.steps.call import running_call
from torchao_masquant.steps.converting import plan_recipe, plan_rounding
from torchao_masquant.steps.loading import plan_loading
from torchao_masquant.steps.observing import OBSERVED, plan_observed, plan_prepare

__all__: list[str] = []


class _Plan:
    """What one config does to the modules of a model in one call of ``quantize_``.

    Args:
        model: that the call is for.
        config: as it is in this call, checked.
        actions: what changes each module; none has run yet.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MASQuantConfig,
        actions: Actions,
    ):
        self.config = config
        self.parents = {
            child: parent for parent in model.modules() for child in parent.children()
        }
        self.actions: Actions = {}
        self.targets: set[nn.Module] = set()
        self.add(actions)

    def add(self, actions: Actions) -> None:
        self.actions |= actions
        self.targets.update(actions)

    def apply(self, module: nn.Module) -> None:
        # Taken out before it runs, not to be run twice.
        action = self.actions.pop(module, None)
        if action is not None:
            action()


@register_quantize_module_handler(MASQuantConfig)
def _masquant_transform(module: nn.Module, config: MASQuantConfig) -> nn.Module:
    call = running_call()
    model = call.model
    plan: Optional[_Plan] = call.plans.get(id(config))
    if plan is None:
        checked = config.checked()
        plan = _Plan(model, checked, _plan(model, checked, module))
        call.plans[id(config)] = plan
        _attach(model, plan)
    elif (
        plan.config.step == QuantizationStep.CONVERT
        and isinstance(module, OBSERVED)
        and module not in plan.targets
    ):
        # Observed by another "prepare" step than those before it.
        plan.add(plan_observed(model, plan.config, module.session))
        _attach(model, plan)
    plan.apply(module)
    if call.chooses_linears:
        _transform_experts(model, plan)
    if plan.config.step != QuantizationStep.PREPARE and isinstance(
        module, (MASQuantLinear, MASQuantExperts)
    ):
        share_smoothing(plan.parents.get(module, module))
        if next(module.parameters()).device.type == "cpu":
            cpu_lowering.prepare()
    return module


def _transform_experts(model: nn.Module, plan: _Plan) -> None:
    """Do what is planned for experts, which are not handed over one by one."""
    if plan.config.step == QuantizationStep.CONVERT:
        for module in model.modules():
            if (
                isinstance(module, MASQuantObservedExperts)
                and module not in plan.targets
            ):
                plan.add(plan_observed(model, plan.config, module.session))
                _attach(model, plan)
    for module in [m for m in plan.actions if not isinstance(m, nn.Linear)]:
        plan.apply(module)


def _attach(model: nn.Module, plan: _Plan) -> None:
    """Let a transformers model that is being quantized save itself."""
    if plan.config.step == QuantizationStep.CONVERT:
        attach_to_transformers(
            model, plan.targets, plan.config.options, plan.config.description
        )
    elif plan.config.step == QuantizationStep.PREPARE_FOR_LOADING:
        attach_to_transformers(model)


def _plan(model: nn.Module, config: MASQuantConfig, module: nn.Module) -> Actions:
    if config.step == QuantizationStep.PREPARE:
        return plan_prepare(model, config)
    if config.step == QuantizationStep.PREPARE_FOR_LOADING:
        return plan_loading(model, config)
    if config.loaded_recipe is not None:
        return plan_recipe(model, config, config.loaded_recipe)
    observed = [m for m in model.modules() if isinstance(m, OBSERVED)]
    if not observed and not config.options.procedure.smooth:
        return plan_rounding(model, config)
    if not observed:
        raise ValueError(
            f"{type(model).__name__} has no observed linear to convert: call "
            "quantize_(model, MASQuantConfig(step='prepare', ...)) and run calibration "
            "data first, or give a recipe; method='rtn' needs neither."
        )
    first = module if isinstance(module, OBSERVED) else observed[0]
    return plan_observed(model, config, first.session)
