# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From an ``nn.Linear``, or experts, and their part of a recipe to quantized ones."""

from typing import Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.schemes import Scheme
from torchao_masquant.tensor_subclasses import MASQuantTensor, check_group_size

__all__ = [
    "convert_experts",
    "convert_linear",
    "placeholder_weight",
]


def convert_linear(
    linear: nn.Linear,
    fqn: str,
    layer: LayerRecipe,
    scheme: Scheme,
    modalities: Sequence[str],
    router: Optional[Router],
    low_rank_bits: int = 16,
) -> MASQuantLinear:
    """Quantize one linear in place.

    Args:
        linear: (N, K) floating point.
        fqn: its name in the model.
        layer: made for its weight; its integers, where it has them, take the place of
            rounding to nearest.
        scheme: integer formats.
        modalities: names, base first.
        router: its model's.
        low_rank_bits: 16 or 8, of the low-rank pairs.

    Returns:
        ``linear`` itself, quantized.

    Raises:
        ValueError: the weight does not fit the scheme or the recipe; names ``fqn``.
    """
    try:
        quantized = layer.quantize(
            linear.weight.data, scheme, modalities, low_rank_bits
        )
    except ValueError as error:
        raise ValueError(f"{fqn}: {error}") from error
    return MASQuantLinear.from_float(linear, quantized, fqn, router)


def convert_experts(
    experts: nn.Module,
    fqn: str,
    layers: Mapping[str, LayerRecipe],
    scheme: Scheme,
    modalities: Sequence[str],
    router: Optional[Router],
    low_rank_bits: int = 16,
) -> MASQuantExperts:
    """Quantize the experts of a layer in place.

    Args:
        experts: a module of transformers, of a known layout.
        fqn: its name in the model.
        layers: name of each of its projections to the part made for its weights.

    All else is as in :func:`convert_linear`.

    Returns:
        ``experts`` itself, quantized.

    Raises:
        ValueError: a weight does not fit the scheme or the recipe; names ``fqn``.
    """
    weights = {}
    for name, layer in layers.items():
        try:
            weights[name] = layer.quantize(
                ExpertWeight(experts, name).weight, scheme, modalities, low_rank_bits
            )
        except ValueError as error:
            raise ValueError(f"{fqn}.{name}: {error}") from error
    return MASQuantExperts.from_float(experts, weights, fqn, router)


def placeholder_weight(
    weight: torch.Tensor, scheme: Scheme, modalities: Sequence[str]
) -> MASQuantTensor:
    """A quantized weight of zeros, to be replaced by one from a checkpoint.

    Args:
        weight: (N, K) of a linear or (E, N, K) of experts, also on the meta device: its
            values are not touched.
        scheme: integer formats.
        modalities: names, base first.

    Raises:
        ValueError: the scheme's group size does not divide the input width.
    """
    if weight.dim() == 3:
        of_one = _zeros(weight[0], scheme, modalities)
        return MASQuantTensor.stack([of_one] * weight.shape[0])
    return _zeros(weight, scheme, modalities)


def _zeros(
    weight: torch.Tensor, scheme: Scheme, modalities: Sequence[str]
) -> MASQuantTensor:
    n, k = weight.shape
    device = weight.device
    check_group_size(scheme.group_size, (n, k))
    groups = 1 if scheme.group_size is None else k // scheme.group_size
    packed = scheme.weight_bits <= 4
    return MASQuantTensor(
        torch.zeros(
            (n, (k + 1) // 2 if packed else k),
            dtype=torch.uint8 if packed else torch.int8,
            device=device,
        ),
        torch.zeros((n, groups), dtype=torch.float32, device=device),
        torch.ones((len(modalities), k), dtype=torch.float32, device=device),
        k,
        scheme.weight_bits,
        scheme.act_bits,
        modalities,
        (),
        weight.dtype,
        zero_point=None
        if scheme.symmetric
        else torch.zeros((n, groups), dtype=torch.int8, device=device),
    )
