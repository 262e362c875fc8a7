# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From an ``nn.Linear``, or experts, and their part of a recipe to quantized ones."""

from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.experts import ExpertWeight
from torchao_masquant.kernels.hadamard import check_hadamard_size
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.options import Scheme, SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    check_group_size,
    low_rank_dtype,
)

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
    name: str,
    weight: torch.Tensor,
    options: SolverOptions,
    modalities: Sequence[str],
) -> MASQuantTensor:
    """A quantized weight of zeros, for one from a checkpoint to replace or to fill.

    It has all parts that the options give a weight, so ``copy_`` has room for each. With
    a rank of "auto", which only the data can tell, its pairs have the rank that takes as
    many bytes everywhere.

    Args:
        name: of the linear, or of the experts' projection.
        weight: (N, K) of a linear or (E, N, K) of experts, also on the meta device: its
            values are not touched.
        options: scheme, method, rank and parts of the method.
        modalities: names, base first.

    Raises:
        ValueError: the group size, or that of a rotation, does not divide the input
            width.
    """
    *experts, n, k = weight.shape
    scheme, method = options.number_format, options.procedure
    check_group_size(scheme.group_size, (n, k))
    groups = 1 if scheme.group_size is None else k // scheme.group_size
    packed = scheme.weight_bits <= 4
    told_apart = method.per_modality and not options.spares(name)
    factors = len(modalities) if told_apart else 1
    rank = options.average_rank(n, k) if told_apart else 0
    ranks = (rank,) * (len(modalities) - 1) if rank else ()

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((*experts, *shape), dtype=dtype, device=weight.device)

    parts: dict[str, Any] = {}
    if told_apart and (size := options.hadamard_size_of(k)) is not None:
        check_hadamard_size(size, k)
        parts["hadamard_size"] = size
    if ranks:
        quantized = options.low_rank_bits == 8
        dtype = torch.int8 if quantized else low_rank_dtype(weight.dtype)
        parts["l1"] = zeros(k, sum(ranks), dtype=dtype)
        parts["l2"] = zeros(sum(ranks), n, dtype=dtype)
        if quantized:
            parts["low_rank_scale"] = zeros(sum(ranks))
    if told_apart and method.centered:
        parts["modality_bias"] = zeros(factors, n)
    if told_apart and method.shift:
        # Each expert's own, which has room for one that they share.
        parts["act_shift"] = zeros(factors, k)
    if not scheme.symmetric:
        parts["zero_point"] = zeros(n, groups, dtype=torch.int8)
    return MASQuantTensor(
        zeros(n, (k + 1) // 2, dtype=torch.uint8)
        if packed
        else zeros(n, k, dtype=torch.int8),
        zeros(n, groups),
        torch.ones((factors, k), dtype=torch.float32, device=weight.device),
        k,
        scheme.weight_bits,
        scheme.act_bits,
        modalities,
        ranks,
        weight.dtype,
        **parts,
    )
