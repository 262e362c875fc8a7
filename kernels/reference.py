# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Plain implementations of the ``masquant::`` operators, for every device.

Written to be read: each function is its formula. Integers are accumulated in
int32 (or exactly in float64 where a device has no integer matmul), everything
else in float32. The operators take their schemas from the signatures here. Faster
lowerings register for their own dispatch key and are tested against these.
"""

from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.int4_packing import unpack_int4
from torchao_masquant.kernels.library import operator


def smooth_tokens(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> torch.Tensor:
    """(T, K) float32 ``H (x * p_m - o_m)``, arguments as of :func:`smooth_quantize`."""
    smoothed = x.float() * _rows(act_pre_scale, modality_ids)
    if act_shift is not None:
        smoothed = smoothed - _rows(act_shift, modality_ids)
    return hadamard_rotate(smoothed, hadamard_size)


def _rows(
    per_modality: torch.Tensor, modality_ids: Optional[torch.Tensor]
) -> torch.Tensor:
    """Of (M, L), each token's row (T, L), or the base's (1, L) for all."""
    if modality_ids is None:
        return per_modality[:1]
    return per_modality.index_select(0, modality_ids.long())


@operator(
    lambda x: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    ),
    returns="(Tensor qdata, Tensor scale)",
)
def smooth_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q = round(v / s)``, ``v = H (x * p_m - o_m)``, ``s = max |v| / (2 ** (bits - 1) - 1)``.

    Divides each token by the smoothing factor of its modality, moves it by the
    modality's shift, rotates it, and quantizes it, symmetric, per token, dynamically.

    Args:
        x: (T, K) floating point.
        act_pre_scale: (M, K) float32, reciprocal smoothing factors ``p_m``, base
            modality first.
        modality_ids: (T,) integers in [0, M), or None: every token is base.
        act_bits: 2 to 8; fewer than 8 bits are still held in int8.
        act_shift: (M, K) float32 ``o_m``, or None for zeros.
        hadamard_size: b of the rotation ``H``, see
            :mod:`torchao_masquant.kernels.hadamard`; 1 for none.

    Returns:
        ``qdata`` (T, K) int8 and ``scale`` (T, 1) float32.
    """
    quant_max = 2 ** (act_bits - 1) - 1
    smoothed = smooth_tokens(x, act_pre_scale, modality_ids, act_shift, hadamard_size)
    scale = smoothed.abs().amax(dim=-1, keepdim=True) / quant_max
    # A token of zeros has no scale; any positive one gives back its zeros.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    qdata = (smoothed / scale).round().clamp(-quant_max, quant_max)
    return qdata.to(torch.int8, memory_format=torch.contiguous_format), scale


def hidden_like(qdata: torch.Tensor, l1: torch.Tensor) -> torch.Tensor:
    """An empty result of an operator that projects down."""
    return qdata.new_empty((qdata.shape[0], l1.shape[1]), dtype=torch.float32)


@operator(hidden_like)
def low_rank_down(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``h = (s * q) L1 * s_r``, the columns of other modalities set to zero.

    Args:
        qdata: (T, K) int8, smoothed and quantized tokens.
        scale: (T, 1) float32.
        l1: (K, R) floating point or int8, the down-projections of the modalities
            1, 2, ... side by side.
        modality_ids: (T,) integers.
        ranks: columns of ``l1`` that belong to modality 1, 2, ...; they sum to R.
        low_rank_scale: (R,) float32 ``s_r`` where the pair is int8, that of both of
            its sides; None for ones.

    Returns:
        (T, R) float32.
    """
    return low_rank_of(qdata.float() * scale, l1, modality_ids, ranks, low_rank_scale)


def low_rank_of(
    smoothed: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor],
) -> torch.Tensor:
    """(T, R) float32 of :func:`low_rank_down`, of (T, K) float32 smoothed tokens."""
    owner = torch.cat(
        [torch.full((r,), m, device=l1.device) for m, r in enumerate(ranks, 1)]
    )
    hidden = smoothed @ l1.float()
    if low_rank_scale is not None:
        hidden = hidden * low_rank_scale
    # where, not a product: a token's inf or nan must not leak through 0 * inf.
    return torch.where(modality_ids.long()[:, None] == owner, hidden, 0.0)


def _int_matmul(qx: torch.Tensor, qdata: torch.Tensor) -> torch.Tensor:
    """(T, K) int8 by (N, K) int8 -> (T, N) int32, exact."""
    # Of a single channel torch._int_mm gives numbers that are none of its product.
    if qx.device.type == "cpu" and qx.shape[1] > 1:
        return torch._int_mm(qx.contiguous(), qdata.t())
    return (qx.double() @ qdata.double().t()).to(torch.int32)


def product_like(
    qx: torch.Tensor, qdata: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """An empty result of an operator that multiplies quantized tokens."""
    return qx.new_empty((qx.shape[0], qdata.shape[0]), dtype=out_dtype)


@operator(product_like)
def int_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    weight_bits: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y = s_x s_w (q_x q_w^T) + h L2 + b_m + b``.

    Args:
        qx: (T, K) int8.
        x_scale: (T, 1) float32.
        qdata: (N, K) int8, or (N, ceil(K / 2)) uint8 where ``weight_bits`` is at most
            4.
        scale: (N, G) float32; each of the G scales serves K / G neighbours.
        low_rank_hidden: (T, R) float32 or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None: what each modality adds.
        modality_ids: (T,) integers or None: every token is base.
        bias: (N,) floating point or None.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.

    Returns:
        (T, N) ``out_dtype``.
    """
    tokens, in_features = qx.shape
    if weight_bits <= 4:
        qdata = unpack_int4(qdata, in_features)
    out_features, groups = scale.shape
    if groups == 1:
        y = _int_matmul(qx, qdata).float() * scale.t()
    else:
        y = torch.zeros(tokens, out_features, dtype=torch.float32, device=qx.device)
        width = in_features // groups
        for g in range(groups):
            columns = slice(g * width, (g + 1) * width)
            partial = _int_matmul(qx[:, columns], qdata[:, columns])
            y += partial.float() * scale[:, g]
    y = add_low_rank(y * x_scale, low_rank_hidden, l2)
    return add_biases(y, modality_bias, modality_ids, bias).to(out_dtype)


def add_low_rank(
    y: torch.Tensor, low_rank_hidden: Optional[torch.Tensor], l2: Optional[torch.Tensor]
) -> torch.Tensor:
    """(T, N) float32 ``y + h L2``, arguments as of :func:`int_linear`."""
    if low_rank_hidden is None:
        return y
    assert l2 is not None
    return y + low_rank_hidden @ l2.float()


def add_biases(
    y: torch.Tensor,
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """(T, N) float32 ``y + b_m + b``, arguments as of :func:`int_linear`."""
    if modality_bias is not None:
        y = y + _rows(modality_bias.float(), modality_ids)
    if bias is not None:
        y = y + bias.float()
    return y


@operator(
    lambda x, qdata, out_dtype: x.new_empty(
        (x.shape[0], qdata.shape[0]), dtype=out_dtype
    )
)
def weight_only_linear(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> torch.Tensor:
    """``y = v (s_w (q_w - z))^T + v L1_m * s_r L2_m + b_m + b``, ``v = H (x p_m)``.

    Args:
        x: (T, K) floating point.
        act_pre_scale: (M, K) float32, reciprocal smoothing factors ``p_m``, base
            modality first.
        qdata: (N, K) int8, or (N, ceil(K / 2)) uint8 where ``weight_bits`` is at most
            4.
        scale: (N, G) float32; each of the G scales serves K / G neighbours.
        zero_point: (N, G) int8, or None for zeros.
        l1: (K, R) floating point or int8, or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None: what each modality adds.
        modality_ids: (T,) integers or None: every token is base, and no low-rank work
            is done.
        bias: (N,) floating point or None.
        ranks: columns of ``l1`` that belong to modality 1, 2, ...; they sum to R.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.
        low_rank_scale: (R,) float32 ``s_r`` where the pair is int8; None for ones.
        hadamard_size: b of the rotation, see :mod:`torchao_masquant.kernels.hadamard`;
            1 for none.

    Returns:
        (T, N) ``out_dtype``.
    """
    in_features = x.shape[1]
    if weight_bits <= 4:
        qdata = unpack_int4(qdata, in_features)
    groups = scale.shape[1]
    weight = qdata.float().unflatten(1, (groups, in_features // groups))
    if zero_point is not None:
        weight = weight - zero_point.float()[..., None]
    weight = (weight * scale[..., None]).flatten(1)
    smoothed = smooth_tokens(
        x, act_pre_scale, modality_ids, hadamard_size=hadamard_size
    )
    y = smoothed @ weight.t()
    if l1 is not None and modality_ids is not None:
        hidden = low_rank_of(smoothed, l1, modality_ids, ranks, low_rank_scale)
        y = add_low_rank(y, hidden, l2)
    return add_biases(y, modality_bias, modality_ids, bias).to(out_dtype)
