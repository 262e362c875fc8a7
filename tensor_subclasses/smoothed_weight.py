# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``Q(W * s_base)``: the one set of integers that all modalities share."""

from typing import Optional

import torch
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine_with_min_max,
    dequantize_affine,
    quantize_affine,
)

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.tensor_subclasses.weight_layout import group_count

__all__ = [
    "check_group_size",
    "dequantize_smoothed_weight",
    "quantize_smoothed_weight",
]


def check_group_size(group_size: Optional[int], shape: tuple[int, int]) -> None:
    """Raise unless groups of neighbours divide the rows of a weight.

    Args:
        group_size: None for one scale per output channel.
        shape: (N, K) of the weight.

    Raises:
        ValueError: they do not, or a group would hold a single value.
    """
    # One value: torchao's primitives take such a block for the whole tensor.
    if group_size is not None and (group_size < 2 or shape[1] % group_size):
        raise ValueError(
            "group_size must be at least 2 and divide the input width, got "
            f"group_size={group_size} for a weight of shape {tuple(shape)}."
        )


def quantize_smoothed_weight(
    weight: torch.Tensor,
    act_pre_scale: torch.Tensor,
    weight_bits: int,
    group_size: Optional[int] = None,
    *,
    symmetric: bool = True,
    clip: Optional[torch.Tensor] = None,
    hadamard_size: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Fold the base modality's smoothing factor into a weight and quantize it.

    Round-to-nearest, one scale per output channel or per group of ``group_size``
    neighbours of an output channel. Scales and zero points are torchao's:

    - symmetric: ``max |W / p| / (2 ** bits - 1) * 2``, and all 2 ** bits integers are
      used: the largest positive weight is clipped by half a step, and at 4 bits the
      finer step is worth 0.6 dB;
    - asymmetric: ``(max(W / p, 0) - min(W / p, 0)) / (2 ** bits - 1)``, and the zero
      point is the integer that stands for zero.

    Integers, zero points among them, are signed in both: an unsigned one of ``bits``
    bits less ``2 ** (bits - 1)``, so that 4 bits are packed the same way.

    Args:
        weight: (N, K) floating point.
        act_pre_scale: (K,) float32, the reciprocal of the smoothing factor, as the
            activations will be multiplied by it.
        weight_bits: 8, 4 or 3.
        group_size: divides K; None for one scale per output channel.
        symmetric: whether the zero point is 0.
        clip: (N, G) or (N, 1) factors in (0, 1] of the range that each scale is made
            for; weights outside of it take its ends. None: the whole range.
        hadamard_size: of the rotation of the smoothed weight that is rounded; None for
            none.

    Returns:
        ``qdata`` (N, K) int8 (unpacked, also for 4 bits), ``scale`` (N, G) float32,
        and ``zero_point`` (N, G) int8, None where symmetric.

    Raises:
        ValueError: the weight has a single input channel, the group size does not
            divide its width, or a clip factor is of the wrong shape or range.
    """
    shape = (weight.shape[0], weight.shape[1])
    if shape[1] < 2:
        raise ValueError(
            f"a weight of shape {shape} has too few input channels to be "
            "quantized: exclude its linear."
        )
    check_group_size(group_size, shape)
    groups = group_count(group_size, shape[1])
    block_size = (1, shape[1] // groups)
    smoothed = hadamard_rotate(weight.float() / act_pre_scale, hadamard_size or 1)
    blocks = smoothed.unflatten(1, (groups, block_size[1]))
    least, most = blocks.amin(-1), blocks.amax(-1)
    if clip is not None:
        if tuple(clip.shape) not in ((shape[0], 1), (shape[0], groups)):
            raise ValueError(
                f"clip must have shape {(shape[0], groups)} or {(shape[0], 1)} for a "
                f"weight of shape {shape} with group_size={group_size}, got "
                f"{tuple(clip.shape)}."
            )
        if not ((clip > 0) & (clip <= 1)).all():
            raise ValueError("clip factors must lie in (0, 1].")
        least, most = least * clip.float(), most * clip.float()
    quant_min, quant_max = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    scale, zero_point = choose_qparams_affine_with_min_max(
        least,
        most,
        MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        block_size,
        torch.int8,
        quant_min=quant_min,
        quant_max=quant_max,
        eps=torch.finfo(torch.float32).tiny,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    qdata = quantize_affine(
        smoothed,
        block_size,
        scale,
        zero_point,
        torch.int8,
        quant_min=quant_min,
        quant_max=quant_max,
    )
    return qdata, scale, None if symmetric else zero_point.to(torch.int8)


def dequantize_smoothed_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    output_dtype: torch.dtype = torch.float32,
    zero_point: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The smoothed weight that the integers stand for.

    Args:
        qdata: (N, K) int8.
        scale: (N, G) float32.
        output_dtype: floating point type of the result.
        zero_point: (N, G) int8, or None: symmetric.

    Returns:
        (N, K) ``output_dtype``, an approximation of ``W * s_base``, in the basis of the
        integers: rotated where they are.
    """
    block_size = (1, qdata.shape[1] // scale.shape[1])
    return dequantize_affine(
        qdata, block_size, scale, zero_point, torch.int8, output_dtype=output_dtype
    )
