# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Plain implementations of the operators for activations in floats of 8 and 4 bits.

They are to :mod:`~torchao_masquant.kernels.number_formats` what
:mod:`~torchao_masquant.kernels.reference` is to integers, in the same order::

    qx, sx, tx = float_smooth_quantize(x, act_pre_scale, modality_ids, act_format, ...)
    h          = float_low_rank_down(qx, sx, tx, l1, modality_ids, ranks, act_format)
    y          = float_linear(qx, sx, tx, qdata, scale, row_scale, h, l2, ...)

A token is ``codes * scales of its groups * scale of the token``, the last of which only
"nvfp4" has; a weight is that of its rows. Rounding is exact to the bit: every lowering
gives the same codes and scales. A product is as exact as float32 sums are:

- the product of two codes is exact. Those of e4m3 have 4 significant bits, those of e2m1
  2, integers of 4 bits 3 and a sign, and 8 of the 24 bits of float32 are enough for any two;
- a code times its scale is exact where the scale is e8m0 or e4m3, and so is the product of
  two such. A float32 scale of a group rounds it once, by 2^-24 of it; those of whole tokens
  and rows multiply sums, once each;
- so what differs from the exact result is the K additions of a sum and at most four
  roundings of each term:
  ``|y - exact| <= (K + 6) 2^-24 sum_k |x_k w_k|`` to first order, in whichever order a
  matmul adds. A GPU's matrix instruction adds to no more bits (Hopper's e4m3 to about 14).

No instruction of CPUs multiplies such floats: these functions decode both sides to float32
and multiply these, and say so once (:mod:`~torchao_masquant.kernels.float_instructions`).
GPUs have kernels (:mod:`torchao_masquant.kernels.gpu.float_linear`).
"""

from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.float_instructions import warn_of_emulation
from torchao_masquant.kernels.library import operator
from torchao_masquant.kernels.number_formats import (
    NumberFormat,
    grid_of,
    number_format,
)
from torchao_masquant.kernels.reference import (
    add_biases,
    add_low_rank,
    hidden_like,
    low_rank_of,
    product_like,
    smooth_tokens,
)

__all__ = ["float_linear", "float_low_rank_down", "float_smooth_quantize"]


def _scale_kinds(
    x: torch.Tensor, act_format: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty results of :func:`float_smooth_quantize`."""
    form = number_format(act_format)
    tokens, k = x.shape
    held, groups = k // form.grid.per_byte, k // (form.group_size or k)
    return (
        x.new_empty((tokens, held), dtype=form.grid.dtype),
        x.new_empty((tokens, groups), dtype=form.scale_dtype),
        x.new_empty((tokens, int(form.two_levels)), dtype=torch.float32),
    )


@operator(_scale_kinds, returns="(Tensor qdata, Tensor scale, Tensor token_scale)")
def float_smooth_quantize(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_format: str,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q = nearest(v / s)``, ``v = H (x * p_m - o_m)``, ``s`` by the format's rule.

    As ``smooth_quantize``, but for what tokens are rounded to. With ``a`` the largest
    ``|v|`` of a group, and every step rounded to float32:

    - float32 scales: ``s = max(a / 448, 2^-126)``;
    - "nvfp4": ``t = max(max_g a / (256 * 6), 2^-116)`` of the token,
      ``s = e4m3(max(a / (t * 6), 2^-9))``, and ``v / (s * t)`` is rounded;
    - e8m0: ``s`` is the least power of two, 2^-126 at least, that is no smaller than
      ``a / 448`` ("mxfp8") or ``a / 7`` ("mxfp4").

    Where ``a`` is inf or nan, ``s`` is nan, and so is ``t`` of the token.

    Args:
        x: (T, K) floating point; the format's groups divide K.
        act_pre_scale: (M, K) float32, reciprocal smoothing factors ``p_m``, base
            modality first.
        modality_ids: (T,) integers in [0, M), or None: every token is base.
        act_format: a name in :data:`~torchao_masquant.kernels.number_formats.FORMATS`.
        act_shift: (M, K) float32 ``o_m``, or None for zeros.
        hadamard_size: b of the rotation ``H``, see
            :mod:`torchao_masquant.kernels.hadamard`; 1 for none.

    Returns:
        - ``qdata``: (T, K) float8_e4m3fn, or (T, K / 2) uint8, two e2m1 per byte, the
          first in the low nibble;
        - ``scale``: (T, G) of the format's type, G is 1 where a token has one scale;
        - ``token_scale``: (T, 1) float32 ``t`` of "nvfp4", and (T, 0) of the others.
    """
    form = number_format(act_format)
    values = smooth_tokens(x, act_pre_scale, modality_ids, act_shift, hadamard_size)
    groups = values.shape[1] // (form.group_size or values.shape[1])
    blocks = values.unflatten(1, (groups, values.shape[1] // groups))
    scale, token_scale = form.scales(blocks.abs().amax(-1))
    step = scale if token_scale is None else scale * token_scale
    codes = form.grid.encode(form.grid.nearest(blocks / step[..., None])).flatten(1)
    if token_scale is None:
        token_scale = scale.new_empty((scale.shape[0], 0))
    return form.grid.pack(codes), scale.to(form.scale_dtype), token_scale


def _tokens(
    qx: torch.Tensor, x_scale: torch.Tensor, form: NumberFormat, in_features: int
) -> torch.Tensor:
    """(T, K) float32, but for the scale of a whole token."""
    values = form.grid.decode(form.grid.unpack(qx, in_features))
    return values if form.group_size is None else _scaled(values, x_scale)


def _scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each group of (R, K) times its own of (R, G)."""
    groups = scale.shape[1]
    blocks = values.unflatten(1, (groups, values.shape[1] // groups))
    return (blocks * scale.float()[..., None]).flatten(1)


def _of_token(
    x_scale: torch.Tensor, token_scale: Optional[torch.Tensor], form: NumberFormat
) -> Optional[torch.Tensor]:
    """(T, 1) float32, the scale of a whole token, if there is one."""
    return x_scale if form.group_size is None else token_scale


@operator(hidden_like)
def float_low_rank_down(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    token_scale: Optional[torch.Tensor],
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    act_format: str,
    low_rank_scale: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``h = x L1 * s_r``, the columns of other modalities set to zero.

    Args:
        qdata, scale, token_scale: what :func:`float_smooth_quantize` gives; ``token_scale``
            is None where that has no columns.
        l1: (K, R) floating point or int8, the down-projections of the modalities
            1, 2, ... side by side.
        modality_ids: (T,) integers.
        ranks: columns of ``l1`` that belong to modality 1, 2, ...; they sum to R.
        act_format: of the tokens.
        low_rank_scale: (R,) float32 ``s_r`` where the pair is int8, that of both of
            its sides; None for ones.

    Returns:
        (T, R) float32.
    """
    form = number_format(act_format)
    tokens = _tokens(qdata, scale, form, l1.shape[0])
    of_token = _of_token(scale, token_scale, form)
    if of_token is not None:
        tokens = tokens * of_token
    return low_rank_of(tokens, l1, modality_ids, ranks, low_rank_scale)


@operator(product_like)
def float_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    token_scale: Optional[torch.Tensor],
    qdata: torch.Tensor,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    act_format: str,
    weight_format: Optional[str],
    weight_bits: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``y = t_x t_w sum_g s_x,g s_w,g q_x,g q_w,g^T + h L2 + b_m + b``.

    Args:
        qx, x_scale, token_scale: what :func:`float_smooth_quantize` gives; ``token_scale``
            is None where that has no columns.
        qdata: (N, K) float8_e4m3fn or int8, or (N, K / 2) uint8: two e2m1, or two
            integers of 4 bits, per byte.
        scale: (N, G) of the weight's format, float32 for integers; each of the G scales
            serves K / G neighbours.
        row_scale: (N,) float32 ``t_w`` where the weight is "nvfp4", else None.
        low_rank_hidden: (T, R) float32 or None.
        l2: (R, N) floating point or int8, or None.
        modality_bias: (M, N) floating point or None: what each modality adds.
        modality_ids: (T,) integers or None: every token is base.
        bias: (N,) floating point or None.
        act_format: of the tokens.
        weight_format: of the weight; None: integers of ``weight_bits``.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.

    Returns:
        (T, N) ``out_dtype``.
    """
    warn_of_emulation(qx.device)
    form, grid = number_format(act_format), grid_of(weight_bits, weight_format)
    in_features = qx.shape[1] * form.grid.per_byte
    weight = grid.decode(grid.unpack(qdata, in_features))
    if scale.shape[1] > 1:
        weight = _scaled(weight, scale)
    y = _tokens(qx, x_scale, form, in_features) @ weight.t()
    if scale.shape[1] == 1:
        y = y * scale.float().t()
    if row_scale is not None:
        y = y * row_scale
    of_token = _of_token(x_scale, token_scale, form)
    if of_token is not None:
        y = y * of_token
    y = add_low_rank(y, low_rank_hidden, l2)
    return add_biases(y, modality_bias, modality_ids, bias).to(out_dtype)
