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
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)


def quantize_smoothed_weight(
    weight: torch.Tensor,
    act_pre_scale: torch.Tensor,
    weight_bits: int,
    group_size: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the base modality's smoothing factor into a weight and quantize it.

    Symmetric round-to-nearest, one scale per output channel or per group of
    ``group_size`` neighbours of an output channel. The scale is torchao's symmetric
    one, ``max |W / p| / (2 ** bits - 1) * 2``, and all 2 ** bits integers are used:
    the largest positive weight is clipped by half a step, and at 4 bits the finer
    step is worth 0.6 dB.

    Args:
        weight: (N, K) floating point.
        act_pre_scale: (K,) float32, the reciprocal of the smoothing factor, as the
            activations will be multiplied by it.
        weight_bits: 8 or 4.
        group_size: divides K; None for one scale per output channel.

    Returns:
        ``qdata`` (N, K) int8 (unpacked, also for 4 bits) and ``scale`` (N, G)
        float32.

    Raises:
        ValueError: the weight has a single input channel.
    """
    if weight.shape[1] < 2:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has too few input channels to be "
            "quantized: exclude its linear."
        )
    smoothed = weight.float() / act_pre_scale
    quant_min, quant_max = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    block_size = (1, group_size or weight.shape[1])
    scale, zero_point = choose_qparams_affine(
        smoothed,
        MappingType.SYMMETRIC,
        block_size,
        torch.int8,
        quant_min=quant_min,
        quant_max=quant_max,
        eps=torch.finfo(torch.float32).tiny,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
        keepdim=True,
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
    return qdata, scale


def dequantize_smoothed_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    output_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The smoothed weight that the integers stand for.

    Args:
        qdata: (N, K) int8.
        scale: (N, G) float32.
        output_dtype: floating point type of the result.

    Returns:
        (N, K) ``output_dtype``, an approximation of ``W * s_base``.
    """
    block_size = (1, qdata.shape[1] // scale.shape[1])
    return dequantize_affine(
        qdata, block_size, scale, None, torch.int8, output_dtype=output_dtype
    )
