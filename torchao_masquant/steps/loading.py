# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The step "prepare_for_loading"."""

from functools import partial
from typing import Mapping

import torch
from torch import nn

from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.convert import placeholder_weight
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.routing import Router, router_of
from torchao_masquant.steps.actions import (
    Actions,
    by_module,
    quantized_with,
    select_rest,
)
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["plan_loading"]


def plan_loading(model: nn.Module, config: MASQuantConfig) -> Actions:
    """Give what is chosen weights of zeros, to load a quantized state_dict into.

    Raises:
        ValueError: as :func:`~torchao_masquant.selection.select`, and as
            :func:`~torchao_masquant.calibration.request.check_request`.
    """
    modalities = base_first(model, config.base_modality, config.modalities)

    def placeholder(name: str, weight: torch.Tensor) -> MASQuantTensor:
        return placeholder_weight(name, weight, config.options, modalities)

    def is_made(name: str, weight: MASQuantTensor) -> bool:
        return weight.same_layout(placeholder(name, weight))

    # By a call that did not finish.
    done = quantized_with(model, is_made)
    selected = select_rest(model, config, modalities, done)
    check_request(model, selected, modalities, config.options)
    # Another part of the model may be made ready already, by another config.
    router = router_of(model)
    if router is None or router.modalities != modalities:
        router = Router.for_model(model, modalities)
    # The other part may not have needed it. Not twice, where it is attached already.
    router.detach(model)
    router.attach(model)

    def load(name: str, linear: nn.Linear) -> None:
        weight = placeholder(name, linear.weight)
        MASQuantLinear.from_float(linear, weight, name, router)

    def load_experts(experts: nn.Module, weights: Mapping[str, ExpertWeight]) -> None:
        zeros = {w.parameter: placeholder(n, w.weight) for n, w in weights.items()}
        name, weight = next(iter(weights.items()))
        fqn = name.removesuffix(f".{weight.parameter}")
        MASQuantExperts.from_float(experts, zeros, fqn, router)

    return {
        linear: partial(load, name, linear) for name, linear in selected.linears.items()
    } | {
        experts: partial(load_experts, experts, weights)
        for experts, weights in by_module(selected.experts).items()
    }
