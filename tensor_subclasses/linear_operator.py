# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::linear`` of a :class:`MASQuantTensor`, and what torch's own linear is of it."""

from typing import Any, Optional

import torch
from torchao.utils import fill_defaults

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__ = ["check_ids", "product", "smooth", "weight_only_product"]

aten = torch.ops.aten
implements = MASQuantTensor.implements
implements_torch_function = MASQuantTensor.implements_torch_function


def _same_smoothing(weight: MASQuantTensor, other: torch.Tensor) -> bool:
    """Whether shapes and types allow that two weights smooth and quantize alike."""
    return (
        isinstance(other, MASQuantTensor)
        and other.device == weight.device
        and other.act_bits == weight.act_bits
        and other.act_format == weight.act_format
        and other.hadamard_size == weight.hadamard_size
        and other.act_pre_scale.shape == weight.act_pre_scale.shape
        and (other.act_shift is None) == (weight.act_shift is None)
    )


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, MASQuantTensor):
        raise TypeError(
            "masquant::linear takes a MASQuantTensor as its weight, and plain tensors "
            f"as everything else; got a {type(weight).__name__} weight."
        )
    if weight.dim() != 2:
        raise ValueError(
            f"masquant::linear takes the weight of one linear, got {weight!r}: experts "
            "are for masquant::expert_linear."
        )


def check_ids(modality_ids: Optional[torch.Tensor], x: torch.Tensor) -> None:
    """Raise unless there is a modality id for each token of an input.

    Args:
        modality_ids: None: every token is base.
        x: (..., K).

    Raises:
        ValueError: there are more or fewer.
        TypeError: they are no integers.
    """
    if modality_ids is None:
        return
    if modality_ids.shape != x.shape[:-1]:
        raise ValueError(
            f"modality ids of shape {tuple(modality_ids.shape)} do not match the "
            f"tokens of an input of shape {tuple(x.shape)}."
        )
    if modality_ids.is_floating_point() or modality_ids.dtype == torch.bool:
        raise TypeError(f"modality ids are integers, got {modality_ids.dtype}.")


def smooth(
    weight: Any,
    tokens: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_pre_scale: Optional[torch.Tensor] = None,
    act_shift: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, ...]:
    """What meets a weight: a token's integers or codes of floats, and their scales.

    Args:
        weight: a :class:`MASQuantTensor`, or whatever has its parts and numbers as
            attributes, as those below; its activations are quantized.
        tokens: (T, K) floating point.
        modality_ids: (T,) integers, or None: all are base.
        act_pre_scale: (M, K) in place of the weight's own.
        act_shift: (M, K) likewise, where there is an ``act_pre_scale``.

    Returns:
        (T, K) int8 and (T, 1) float32 of integers; where activations have a number format,
        (T, K) or (T, K / 2) codes, (T, G) scales of groups and (T, 1) or (T, 0) of tokens.
    """
    if act_pre_scale is None:
        act_pre_scale, act_shift = weight.act_pre_scale, weight.act_shift
    rotation = weight.hadamard_size or 1
    if weight.act_format is None:
        return torch.ops.masquant.smooth_quantize(
            tokens, act_pre_scale, modality_ids, weight.act_bits, act_shift, rotation
        )
    return torch.ops.masquant.float_smooth_quantize(
        tokens, act_pre_scale, modality_ids, weight.act_format, act_shift, rotation
    )


def product(
    weight: Any,
    smoothed: tuple[torch.Tensor, ...],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """(T, N) ``dtype``, of what :func:`smooth` gives; base-only calls run no pair."""
    paired = modality_ids is not None and weight.l1 is not None
    if weight.act_format is not None:
        return _float_product(weight, smoothed, modality_ids, bias, dtype, paired)
    qx, x_scale = smoothed
    hidden = None
    if paired:
        hidden = torch.ops.masquant.low_rank_down(
            qx,
            x_scale,
            weight.l1,
            modality_ids,
            weight.ranks,
            weight.low_rank_scale,
        )
    return torch.ops.masquant.int_linear(
        qx,
        x_scale,
        weight.qdata,
        weight.scale,
        hidden,
        weight.l2 if paired else None,
        weight.modality_bias,
        modality_ids,
        bias,
        weight.weight_bits,
        dtype,
    )


def _float_product(
    weight: Any,
    smoothed: tuple[torch.Tensor, ...],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    dtype: torch.dtype,
    paired: bool,
) -> torch.Tensor:
    qx, x_scale, token_scale = smoothed
    tokens = qx, x_scale, token_scale if token_scale.shape[1] else None
    hidden = None
    if paired:
        hidden = torch.ops.masquant.float_low_rank_down(
            *tokens,
            weight.l1,
            modality_ids,
            weight.ranks,
            weight.act_format,
            weight.low_rank_scale,
        )
    return torch.ops.masquant.float_linear(
        *tokens,
        weight.qdata,
        weight.scale,
        weight.row_scale,
        hidden,
        weight.l2 if paired else None,
        weight.modality_bias,
        modality_ids,
        bias,
        weight.act_format,
        weight.weight_format,
        weight.weight_bits,
        dtype,
    )


def weight_only_product(
    weight: Any,
    tokens: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    smoothed_by: Any,
) -> torch.Tensor:
    """(T, N) of the tokens' type, where activations are not quantized.

    Args:
        smoothed_by: the weight, or one that smooths like it.
    """
    # A base-only call hands no pair on.
    paired = modality_ids is not None
    return torch.ops.masquant.weight_only_linear(
        tokens,
        smoothed_by.act_pre_scale,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.l1 if paired else None,
        weight.l2 if paired else None,
        weight.modality_bias,
        modality_ids,
        bias,
        weight.ranks,
        weight.weight_bits,
        tokens.dtype,
        weight.low_rank_scale if paired else None,
        weight.hadamard_size or 1,
    )


@implements(torch.ops.masquant.linear.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, modality_ids, bias, smoothed_by = fill_defaults(args, 5, [None] * 3)
    _check_weight(weight)
    if smoothed_by is None:
        smoothed_by = weight
    elif not _same_smoothing(weight, smoothed_by):
        raise ValueError(
            "smoothed_by must be a weight with the same smoothing factors, rotation and "
            f"bits of activations on the same device as {weight!r}, got {smoothed_by!r}."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"masquant::linear takes a floating point input, got {x.dtype}."
        )
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"input width {x.shape[-1]} does not match the weight's "
            f"in_features={weight.in_features} (input shape {tuple(x.shape)}, weight "
            f"shape {tuple(weight.shape)})."
        )
    check_ids(modality_ids, x)
    if modality_ids is not None:
        modality_ids = modality_ids.reshape(-1) if weight.is_routed else None
    tokens = x.reshape(-1, x.shape[-1])
    if weight.weight_only:
        y = weight_only_product(weight, tokens, modality_ids, bias, smoothed_by)
    else:
        smoothed = smooth(smoothed_by, tokens, modality_ids)
        y = product(weight, smoothed, modality_ids, bias, x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@implements(aten.linear.default)
@implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x = kwargs["input"] if "input" in kwargs else args[0]
    weight = kwargs["weight"] if "weight" in kwargs else args[1]
    bias = kwargs["bias"] if "bias" in kwargs else (args[2] if len(args) > 2 else None)
    _check_weight(weight)
    if weight.is_routed:
        raise RuntimeError(
            "torch.nn.functional.linear does not know the modality of a token, and "
            f"this weight treats {weight.modalities} differently: call its "
            "MASQuantLinear, or torch.ops.masquant.linear with modality_ids (None for "
            f"tokens that are all {weight.modalities[0]})."
        )
    return torch.ops.masquant.linear(x, weight, None, bias)


@implements([aten.t.default, aten.transpose.int])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    # No matmul of ours takes a transposed weight: it is for shape arithmetic and
    # inspection, so it gives the values in high precision.
    if args[0].is_routed:
        # aten::linear, where it meets no __torch_function__, is a transpose and a matmul.
        raise RuntimeError(
            "a matmul with a transposed weight does not know the modality of a token, "
            f"and this weight treats {args[0].modalities} differently: call its "
            "MASQuantLinear or torch.ops.masquant.linear, or dequantize(modality=...) "
            "before transposing."
        )
    return func(args[0].dequantize(), *args[1:], **kwargs)
