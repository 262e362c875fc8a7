# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From an ``nn.Linear`` and its part of a recipe to a quantized linear."""

from typing import Optional, Sequence

import torch
from torch import nn

from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.schemes import Scheme
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["convert_linear", "placeholder_weight"]


def convert_linear(
    linear: nn.Linear,
    fqn: str,
    layer: LayerRecipe,
    scheme: Scheme,
    modalities: Sequence[str],
    router: Optional[Router],
) -> MASQuantLinear:
    """Quantize one linear in place.

    Args:
        linear: (N, K) floating point.
        fqn: its name in the model.
        layer: made for its weight.
        scheme: numbers of bits.
        modalities: names, base first.
        router: its model's.

    Returns:
        ``linear`` itself, quantized.
    """
    weight = MASQuantTensor.from_hp(
        linear.weight.data,
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        modalities=modalities,
        smoothing_factor=layer.smoothing_factor,
        ranks=layer.ranks,
        l1=layer.l1,
        l2=layer.l2,
        modality_bias=layer.modality_bias,
    )
    return MASQuantLinear.from_float(linear, weight, fqn, router)


def placeholder_weight(
    linear: nn.Linear, scheme: Scheme, modalities: Sequence[str]
) -> MASQuantTensor:
    """A quantized weight of zeros, to be replaced by one from a checkpoint.

    Made without touching the weight's values, also on the meta device.
    """
    n, k = linear.weight.shape
    device = linear.weight.device
    packed = scheme.weight_bits == 4
    return MASQuantTensor(
        torch.zeros(
            (n, (k + 1) // 2 if packed else k),
            dtype=torch.uint8 if packed else torch.int8,
            device=device,
        ),
        torch.zeros((n, 1), dtype=torch.float32, device=device),
        torch.ones((len(modalities), k), dtype=torch.float32, device=device),
        k,
        scheme.weight_bits,
        scheme.act_bits,
        modalities,
        (),
        linear.weight.dtype,
    )
