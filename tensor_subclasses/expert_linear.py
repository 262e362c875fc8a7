# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::expert_linear`` of a :class:`MASQuantTensor` with a matrix per expert."""

from typing import Any, Optional

import torch
from torchao.utils import fill_defaults

from torchao_masquant.kernels.expert_operators import expert_of_rows
from torchao_masquant.tensor_subclasses.linear_operator import check_ids, smooth
from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__ = ["expert_product"]


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    modality_ids: "torch.Tensor | None",
) -> None:
    if not isinstance(weight, MASQuantTensor) or weight.dim() != 3:
        raise TypeError(
            "masquant::expert_linear takes a MASQuantTensor (E, N, K) as its weight, "
            f"and plain tensors as everything else; got a weight {weight!r}."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"masquant::expert_linear takes a floating point input, got {x.dtype}."
        )
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(
            f"the input of experts is of shape (T, {weight.in_features}), got "
            f"{tuple(x.shape)}."
        )
    if ends.shape != weight.shape[:1]:
        raise ValueError(
            f"ends must say of each of {weight.shape[0]} experts where its rows end, "
            f"got shape {tuple(ends.shape)}."
        )
    check_ids(modality_ids, x)


def _quantize_by_expert(
    x: torch.Tensor,
    weight: Any,
    ends: torch.Tensor,
    row_ids: Optional[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """``smooth`` of rows in the order of experts, with each expert's shift.

    An expert's modality is to the operator a modality of its own.
    """
    experts, modalities, k = weight.act_shift.shape
    ids = expert_of_rows(ends, x.shape[0]) * modalities
    if row_ids is not None:
        ids = ids + row_ids
    factors = weight.act_pre_scale.expand(experts, modalities, k).reshape(-1, k)
    return smooth(weight, x, ids, factors, weight.act_shift.reshape(-1, k))


def expert_product(
    weight: Any,
    x: torch.Tensor,
    ends: torch.Tensor,
    rows: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """``y[i] = linear(x[rows[i]], weight[e])`` for ``ends[e - 1] <= i < ends[e]``.

    Args:
        weight: a :class:`MASQuantTensor` (E, N, K), or whatever has its parts and numbers
            as attributes.
        x: (T, K) floating point.
        ends: (E,) integers that do not fall.
        rows: (S,) integers, which token each row of the output is of; None: x is in
            the order of the experts itself, and S is T.
        modality_ids: (T,) integers, of x, where the weight is routed; None: every token
            is base.
        bias: (E, N) or None.

    Returns:
        (S, N) of x's type; zeros behind the last expert's rows.
    """

    def of_rows(tokens: torch.Tensor) -> torch.Tensor:
        if rows is None:
            return tokens
        if tokens.is_floating_point() and tokens.element_size() == 1:
            # Floats of 8 bits cannot be selected everywhere.
            return tokens.view(torch.uint8).index_select(0, rows).view(tokens.dtype)
        return tokens.index_select(0, rows)

    row_ids = None if modality_ids is None else of_rows(modality_ids)
    # A base-only call hands no pair on.
    paired = modality_ids is not None and weight.l1 is not None
    pair = (weight.l1, weight.l2) if paired else (None, None)
    low_rank_scale = weight.low_rank_scale if paired else None
    if weight.act_bits == 16:
        return torch.ops.masquant.expert_weight_only_linear(
            of_rows(x),
            ends,
            weight.act_pre_scale,
            weight.qdata,
            weight.scale,
            weight.zero_point,
            *pair,
            weight.modality_bias,
            row_ids,
            bias,
            weight.ranks,
            weight.weight_bits,
            x.dtype,
            low_rank_scale,
            weight.hadamard_size or 1,
        )
    if weight.act_shift is not None and weight.act_shift.dim() == 3:
        smoothed = _quantize_by_expert(of_rows(x), weight, ends, row_ids)
    else:
        # Once for each token, however many experts read it.
        smoothed = tuple(of_rows(part) for part in smooth(weight, x, modality_ids))
    if weight.act_format is not None:
        qx, x_scale, token_scale = smoothed
        return torch.ops.masquant.expert_float_linear(
            qx,
            x_scale,
            token_scale if token_scale.shape[1] else None,
            ends,
            weight.qdata,
            weight.scale,
            weight.row_scale,
            *pair,
            weight.modality_bias,
            row_ids,
            bias,
            weight.ranks,
            weight.act_format,
            weight.weight_format,
            weight.weight_bits,
            x.dtype,
            low_rank_scale,
        )
    return torch.ops.masquant.expert_int_linear(
        *smoothed,
        ends,
        weight.qdata,
        weight.scale,
        *pair,
        weight.modality_bias,
        row_ids,
        bias,
        weight.ranks,
        weight.weight_bits,
        x.dtype,
        low_rank_scale,
    )


@MASQuantTensor.implements(torch.ops.masquant.expert_linear.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, ends, rows, modality_ids, bias = fill_defaults(args, 6, [None] * 3)
    _check(x, weight, ends, modality_ids)
    ids = modality_ids if weight.is_routed else None
    return expert_product(weight, x, ends, rows, ids, bias)
