# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The operators of mixture-of-experts weights: each expert is a matrix of its own.

``masquant::expert_linear`` is what a module calls. As ``masquant::linear`` does, it
leaves its ``weight``, a tensor subclass with one matrix for each expert, to desugar
it::

    qx, sx = smooth_quantize(x, act_pre_scale, modality_ids, act_bits, act_shift, b)
    y      = expert_int_linear(qx[rows], sx[rows], ends, qdata, scale, l1, l2, ...)

likewise to ``float_smooth_quantize`` and ``expert_float_linear`` where activations have a
number format or, where they are not quantized, to ``expert_weight_only_linear`` alone. An
expert's tokens are neighbours: rows ``ends[e - 1]`` to ``ends[e]`` (from 0 for the
first) meet expert e, as in ``torch.nn.functional.grouped_mm``. So how many tokens an
expert gets is data, not a shape, and a compiled graph holds one node for all experts.
A token that several experts read is smoothed and quantized once.

The implementation here hands each expert's rows to the operators for a single matrix,
and with them to whatever kernels these have on the device. ``ends`` is read by the
host, once for each call. On a CPU with kernels of ours the experts of
``expert_int_linear`` are one task for all threads, with the same results bit by bit:
at a few tokens an expert, a call for each costs as much as its product.
"""

from typing import Callable, Optional, Sequence, Union

import torch

from torchao_masquant.kernels.library import operator


@operator()
def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    rows: Optional[torch.Tensor] = None,
    modality_ids: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    raise TypeError(
        "masquant::expert_linear takes a MASQuantTensor of three dimensions as its "
        f"weight, got a plain {weight.dtype} tensor of shape {tuple(weight.shape)}; use "
        "torch.nn.functional.grouped_mm for unquantized experts."
    )


def expert_of_rows(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows,) whose each row is; the last expert's behind all of them."""
    places = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True).clamp_max(ends.shape[0] - 1)


def _of(
    tensor: Optional[torch.Tensor], part: Union[int, slice]
) -> Optional[torch.Tensor]:
    """An expert's, or that of some rows."""
    return None if tensor is None else tensor[part]


def _by_expert(
    ends: torch.Tensor,
    rows: int,
    out_features: int,
    device: torch.device,
    out_dtype: torch.dtype,
    run: Callable[[int, slice], torch.Tensor],
) -> torch.Tensor:
    """(rows, out_features) of what ``run`` gives for each expert that has rows.

    Rows behind the last expert's are of experts elsewhere: zeros.
    """
    y = torch.empty(rows, out_features, dtype=out_dtype, device=device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = run(expert, slice(start, end))
        start = end
    y[start:] = 0
    return y


def _rows_like(
    qx: torch.Tensor, qdata: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """An empty result of products with the experts of rows."""
    return qx.new_empty((qx.shape[0], qdata.shape[1]), dtype=out_dtype)


@operator(_rows_like)
def expert_int_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    ends: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``low_rank_down`` and ``int_linear`` with each row's expert.

    Args:
        qx: (S, K) int8, rows in the order of their experts.
        x_scale: (S, 1) float32.
        ends: (E,) integers that do not fall, where each expert's rows end.
        qdata: (E, N, K) int8, or (E, N, ceil(K / 2)) uint8 where ``weight_bits`` is at
            most 4.
        scale: (E, N, G) float32.
        l1: (E, K, R) floating point or int8, or None: no low-rank work is done.
        l2: (E, R, N) floating point or int8, or None.
        modality_bias: (E, M, N) floating point or None.
        modality_ids: (S,) integers or None: every row is base.
        bias: (E, N) floating point or None.
        ranks: columns of ``l1`` that belong to modality 1, 2, ...; they sum to R.
        weight_bits: 8, 4 or 3.
        out_dtype: floating point type of the result.
        low_rank_scale: (E, R) float32 where the pair is int8.

    Returns:
        (S, N) ``out_dtype``; zeros behind the last expert's rows.
    """

    def run(expert: int, rows: slice) -> torch.Tensor:
        tokens, steps = qx[rows], x_scale[rows]
        ids = _of(modality_ids, rows)
        hidden = up = None
        if l1 is not None and l2 is not None and ids is not None:
            up = l2[expert]
            hidden = torch.ops.masquant.low_rank_down(
                tokens, steps, l1[expert], ids, ranks, _of(low_rank_scale, expert)
            )
        return torch.ops.masquant.int_linear(
            tokens,
            steps,
            qdata[expert],
            scale[expert],
            hidden,
            up,
            _of(modality_bias, expert),
            ids,
            _of(bias, expert),
            weight_bits,
            out_dtype,
        )

    return _by_expert(ends, qx.shape[0], qdata.shape[1], qx.device, out_dtype, run)


@operator(_rows_like)
def expert_float_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    token_scale: Optional[torch.Tensor],
    ends: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    act_format: str,
    weight_format: Optional[str],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``float_low_rank_down`` and ``float_linear`` with each row's expert.

    Args:
        qx: (S, K) or (S, K / 2) codes, rows in the order of their experts.
        x_scale: (S, G) of the format's type.
        token_scale: (S, 1) float32 where the format has two levels, or None.
        qdata: (E, N, K) or (E, N, K / 2), what ``float_linear`` takes of each expert.
        scale: (E, N, G) of the weight's scales.
        row_scale: (E, N) float32 where the weight's format has two levels, or None.
        act_format: of the activations.
        weight_format: None: integers.

    All else is as in :func:`expert_int_linear`.
    """

    def run(expert: int, rows: slice) -> torch.Tensor:
        tokens = qx[rows], x_scale[rows], _of(token_scale, rows)
        ids = _of(modality_ids, rows)
        hidden = up = None
        if l1 is not None and l2 is not None and ids is not None:
            up = l2[expert]
            hidden = torch.ops.masquant.float_low_rank_down(
                *tokens,
                l1[expert],
                ids,
                ranks,
                act_format,
                _of(low_rank_scale, expert),
            )
        return torch.ops.masquant.float_linear(
            *tokens,
            qdata[expert],
            scale[expert],
            _of(row_scale, expert),
            hidden,
            up,
            _of(modality_bias, expert),
            ids,
            _of(bias, expert),
            act_format,
            weight_format,
            weight_bits,
            out_dtype,
        )

    return _by_expert(ends, qx.shape[0], qdata.shape[1], qx.device, out_dtype, run)


@operator(
    lambda x, qdata, out_dtype: x.new_empty(
        (x.shape[0], qdata.shape[1]), dtype=out_dtype
    )
)
def expert_weight_only_linear(
    x: torch.Tensor,
    ends: torch.Tensor,
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
    """``weight_only_linear`` with each row's expert.

    Args:
        x: (S, K) floating point, rows in the order of their experts.
        act_pre_scale: (M, K) float32, which the experts share.
        zero_point: (E, N, G) int8, or None for zeros.
        hadamard_size: b of the rotation, which the experts share; 1 for none.

    All else is as in :func:`expert_int_linear`.
    """

    def run(expert: int, rows: slice) -> torch.Tensor:
        return torch.ops.masquant.weight_only_linear(
            x[rows],
            act_pre_scale,
            qdata[expert],
            scale[expert],
            _of(zero_point, expert),
            _of(l1, expert),
            _of(l2, expert),
            _of(modality_bias, expert),
            _of(modality_ids, rows),
            _of(bias, expert),
            ranks,
            weight_bits,
            out_dtype,
            _of(low_rank_scale, expert),
            hadamard_size,
        )

    return _by_expert(ends, x.shape[0], qdata.shape[1], x.device, out_dtype, run)
