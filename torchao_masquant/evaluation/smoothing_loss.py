# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a modality loses where all share one smoothing factor, foretold and measured.

One input with the ranges ``a_m[k] = max_t |x_t[k]|`` of each modality m. Modality m's
own factor is ``s_m[k] = a_m[k]^alpha / w[k]^(1 - alpha)``, w the largest weight of the
channel; the unified one, SmoothQuant's, is ``s_u[k] = max_m s_m[k]``. Activations are
quantized as at run time, ``x_hat = s Q(x / s)`` with one scale per token, and their
signal-to-noise ratio is ``SQNR(s) = 10 log10(sum |x|^2 / sum |x_hat - x|^2)``. The loss
is ``SQNR(s_m) - SQNR(s_u)``.

Theorem 1 of arXiv 2603.04800: where another modality dominates channel k, the signal
that modality m has there shrinks against the rounding step, by ``20 log10 (s_u[k] /
s_m[k])``, that is alpha times 20 log10 of the ratio of the ranges. The prediction for
an input is the mean over the channels that the modality uses.

The theorem takes the step as given. At run time it follows each token's largest value:
with uniform noise in a step of ``R(s) / q``, ``R(s) = max_k a_m[k] / s[k]``, channel k
of ``x_hat`` has noise of the energy ``s[k]^2 R(s)^2 / (12 q^2)``, so that the loss is
``10 log10 of (R(s_u)^2 sum_k s_u[k]^2) / (R(s_m)^2 sum_k s_m[k]^2)``. That is the
prediction "per token"; a factor common to all channels drops out of it, as it does
from the measured loss.
"""

import math
from typing import Optional

import torch

from torchao_masquant import kernels  # noqa: F401 -- defines the operators
from torchao_masquant.evaluation.analysis import SmoothingLoss
from torchao_masquant.evaluation.decibel import decibel
from torchao_masquant.kernels.number_formats import number_format

__all__ = ["activation_sqnr", "smoothing_loss"]


def smoothing_loss(
    tokens: torch.Tensor,
    absmax: torch.Tensor,
    own: torch.Tensor,
    unified: torch.Tensor,
    act_bits: int,
    act_format: Optional[str] = None,
) -> SmoothingLoss:
    """Loss of one modality at one input.

    Args:
        tokens: (T, K) floating point, some of its tokens.
        absmax: (K,) its range over all of its tokens.
        own: (K,) its own smoothing factor.
        unified: (K,) the factor of all modalities together.
        act_bits: 2 to 8.
        act_format: of activations that are no integers.
    """
    used = absmax > 0
    own_used, unified_used = own[used].double(), unified[used].double()
    predicted = per_token = math.nan
    if used.any():
        ratio = unified_used / own_used
        predicted = 20 * ratio.log10().mean().item()
        per_token = decibel(
            _noise(absmax[used], unified_used), _noise(absmax[used], own_used)
        )
    ratios = [activation_sqnr(tokens, f, act_bits, act_format) for f in (own, unified)]
    return SmoothingLoss(
        predicted=predicted,
        predicted_per_token=per_token,
        measured=ratios[0] - ratios[1],
        own=ratios[0],
        unified=ratios[1],
        tokens=tokens.shape[0],
    )


def _noise(absmax: torch.Tensor, factor: torch.Tensor) -> float:
    """``R(s)^2 sum_k s[k]^2``."""
    step = (absmax.double() / factor).max()
    return (step.square() * factor.square().sum()).item()


def activation_sqnr(
    tokens: torch.Tensor,
    smoothing_factor: torch.Tensor,
    act_bits: int,
    act_format: Optional[str] = None,
) -> float:
    """SQNR of smoothed, quantized and unsmoothed activations, in dB.

    Args:
        tokens: (T, K) floating point.
        smoothing_factor: (K,) positive.
        act_bits: 2 to 8.
        act_format: of activations that are no integers.

    Returns:
        ``10 log10(sum |x|^2 / sum |x_hat - x|^2)``, quantized by the operator that
        quantized models run.
    """
    x = tokens.float()
    pre_scale = smoothing_factor.to(x.device, torch.float32).reciprocal()
    if act_format is not None:
        smoothed = number_format(act_format).rounded(x * pre_scale).double()
    else:
        qdata, scale = torch.ops.masquant.smooth_quantize(
            x, pre_scale[None], None, act_bits
        )
        smoothed = qdata.double() * scale.double()
    x_hat = smoothed / pre_scale.double()
    noise = (x_hat - x.double()).square().sum().item()
    return decibel(x.double().square().sum().item(), noise)
