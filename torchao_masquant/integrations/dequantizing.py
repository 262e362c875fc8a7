# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A plain model of a quantized one."""

from typing import Any, Optional

import torch
from torch import nn

from torchao_masquant.conversion.quantized_modules import (
    quantized_modules,
    quantized_weights,
)
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.reclassing import become_original, change_class
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["dequantize_model"]

# What a quantized module has and a plain one has not.
_OURS = ("fqn", "router", "routed", "smoothed_by", "siblings")


def dequantize_model(model: nn.Module, dtype: Optional[torch.dtype] = None) -> None:
    """Give a model plain linears and experts again, in place.

    Their weights are those that a token of the base modality met; what the others had
    of their own, pairs and biases, has no place in a plain weight.

    Args:
        model: that is quantized.
        dtype: of the weights, and of all other floating point parameters; None for the
            weights' own.
    """
    modules = quantized_modules(model).values()
    for router in {module.router for module in modules if module.router is not None}:
        router.detach(model)
    for module in modules:
        weights = quantized_weights(module)
        if isinstance(module, MASQuantExperts):
            become_original(module)
        else:
            _keep_base_bias(module, weights["weight"])
            change_class(module, nn.Linear)
        transposed = getattr(module, "is_transposed", False)
        for name, weight in weights.items():
            dense = weight.dequantize(dtype)
            if transposed:
                dense = dense.transpose(1, 2).contiguous()
            setattr(module, name, nn.Parameter(dense, requires_grad=False))
        for name in _OURS:
            module.__dict__.pop(name, None)
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _keep_base_bias(linear: Any, weight: MASQuantTensor) -> None:
    """Add to a linear's bias what its weight adds to every token of the base."""
    if linear.bias is None or weight.modality_bias is None:
        return
    own = weight.modality_bias[0].double()
    if weight.act_shift is not None:
        smoothed = weight.dequantize(torch.float64) / weight.act_pre_scale[0].double()
        own = own - smoothed @ weight.act_shift[0].double()
    linear.bias.data = (linear.bias.data.double() + own).to(linear.bias.dtype)
