# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized weights of zeros, which a checkpoint is loaded into."""

from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import check_hadamard_size
from torchao_masquant.options import Scheme, SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    check_group_size,
    low_rank_dtype,
)
from torchao_masquant.tensor_subclasses.weight_layout import WeightLayout, group_count

__all__ = ["placeholder_of", "placeholder_weight"]


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
    n, k = weight.shape[-2:]
    scheme, method = options.number_format, options.procedure
    check_group_size(scheme.group_size, (n, k))
    told_apart = method.tells_apart and not options.spares(name)
    rank = options.average_rank(n, k) if told_apart else 0
    ranks = (rank,) * (len(modalities) - 1) if rank else ()
    hadamard_size = options.hadamard_size_of(k) if told_apart else None
    if hadamard_size is not None:
        check_hadamard_size(hadamard_size, k)
    quantized = options.low_rank_bits == 8
    layout = WeightLayout(
        shape=tuple(weight.shape),
        weight_bits=scheme.weight_bits,
        groups=group_count(scheme.group_size, k),
        modalities=len(modalities),
        factors=len(modalities) if told_apart else 1,
        rank=sum(ranks),
        pair_dtype=torch.int8 if quantized else low_rank_dtype(weight.dtype),
        symmetric=scheme.symmetric,
        bias=told_apart and method.centered,
        shift=told_apart and method.shift,
        # It has room for a shift that experts share, too.
        own_shift=True,
        weight_format=scheme.weight_format,
    )
    return _zeros(layout, weight, scheme, modalities, ranks, hadamard_size)


def placeholder_of(
    layer: LayerRecipe,
    weight: torch.Tensor,
    options: SolverOptions,
    modalities: Sequence[str],
) -> MASQuantTensor:
    """A quantized weight of zeros, of the layout that a part of a recipe gives.

    Args:
        layer: without pairs.
        weight: (N, K), also on the meta device: its values are not touched.
        options: of the recipe.
        modalities: names, base first.
    """
    layout = layer.layout(options.number_format, len(modalities))
    scheme = layer.number_format(options.number_format)
    return _zeros(layout, weight, scheme, modalities, (), layer.hadamard_size)


def _zeros(
    layout: WeightLayout,
    weight: torch.Tensor,
    scheme: Scheme,
    modalities: Sequence[str],
    ranks: Sequence[int],
    hadamard_size: Optional[int],
) -> MASQuantTensor:
    return MASQuantTensor(
        **layout.neutral(weight.device),
        in_features=weight.shape[-1],
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        modalities=modalities,
        ranks=ranks,
        dtype=weight.dtype,
        hadamard_size=hadamard_size,
        weight_format=scheme.weight_format,
        act_format=scheme.act_format,
    )
