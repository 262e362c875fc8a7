# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a MASQuantTensor may be made of."""

from typing import Optional, Sequence

import torch

from torchao_masquant.kernels.hadamard import check_hadamard_size

__all__ = ["check_integers", "check_parts"]


def check_parts(
    shape: tuple[int, int],
    *,
    weight_bits: int,
    act_bits: int,
    modalities: Sequence[str],
    smoothing_factor: torch.Tensor,
    ranks: Sequence[int],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    act_shift: Optional[torch.Tensor],
    low_rank_bits: int,
    hadamard_size: Optional[int],
) -> None:
    """Raise unless all that goes with a weight fits it.

    Args:
        shape: (N, K) of the weight.
        weight_bits: see :class:`MASQuantTensor`, as all below.

    Raises:
        ValueError: a shape or a number of bits does not fit, a pair, bias or shift is
            given where tokens are not told apart, or a shift where activations are not
            quantized.
    """
    n, k = shape
    if hadamard_size is not None:
        check_hadamard_size(hadamard_size, k)
    if weight_bits not in (3, 4, 8):
        raise ValueError(f"weight_bits must be 3, 4 or 8, got {weight_bits}.")
    if act_bits not in (*range(2, 9), 16):
        raise ValueError(
            "act_bits must be in 2..8, or 16 for activations that are not quantized, "
            f"got {act_bits}."
        )
    if low_rank_bits not in (8, 16):
        raise ValueError(f"low_rank_bits must be 8 or 16, got {low_rank_bits}.")
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(
            f"modalities must be distinct names, base first, got {tuple(modalities)}."
        )
    others = len(modalities) - 1
    rank = sum(ranks)
    if tuple(smoothing_factor.shape) not in ((1, k), (others + 1, k)):
        raise ValueError(
            f"smoothing_factor must have shape {(others + 1, k)} for modalities "
            f"{tuple(modalities)} and a weight of shape {(n, k)}, or (1, {k}), got "
            f"{tuple(smoothing_factor.shape)}."
        )
    for name, tensor, expected in (
        ("l1", l1, (k, rank)),
        ("l2", l2, (rank, n)),
        ("modality_bias", modality_bias, (others + 1, n)),
        ("act_shift", act_shift, (others + 1, k)),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} for a weight of shape {(n, k)}, "
                f"modalities {tuple(modalities)} and ranks {tuple(ranks)}, got "
                f"{tuple(tensor.shape)}."
            )
    if (l1 is None) != (l2 is None) or (l1 is None) != (rank == 0):
        raise ValueError(
            "l1, l2 and ranks go together: give all three, or none of them."
        )
    if rank and (len(ranks) != others or min(ranks) < 0):
        raise ValueError(
            f"ranks must hold one rank for each of {tuple(modalities)[1:]}, got "
            f"{tuple(ranks)}."
        )
    if (
        others
        and smoothing_factor.shape[0] == 1
        and (rank or modality_bias is not None or act_shift is not None)
    ):
        raise ValueError(
            "a low-rank pair, a modality bias and a shift need one smoothing factor for "
            f"each of {tuple(modalities)}: with one for all, tokens are not told "
            "apart."
        )
    if act_shift is not None and act_bits == 16:
        raise ValueError(
            "a shift is for activations that are quantized: with act_bits=16 it changes "
            "nothing."
        )


def check_integers(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    weight_bits: int,
) -> None:
    """Raise unless ready integers, their scales and zero points are of one kind.

    Values are looked at where there are any, that is not on the meta device.

    Args:
        qdata: (N, K), should be int8.
        scale: should be (N, G) floating point, positive and finite.
        zero_point: should be (N, G) of an integer type, or None.
        weight_bits: 3, 4 or 8, which all integers must fit.

    Raises:
        TypeError: something is of the wrong type.
        ValueError: a shape or a value does not fit.
    """
    if qdata.dtype != torch.int8:
        raise TypeError(
            "MASQuantTensor.from_integers takes unpacked integers of type int8, got "
            f"{qdata.dtype}."
        )
    n, k = qdata.shape
    groups = scale.shape[1] if scale.dim() == 2 else 0
    if scale.dim() != 2 or scale.shape[0] != n or groups < 1 or k % groups:
        raise ValueError(
            f"scale must have shape ({n}, G), with a number of groups G that divides "
            f"{k}, for integers of shape {(n, k)}, got {tuple(scale.shape)}."
        )
    if k // groups < 2:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} leaves one integer to a group for "
            f"integers of shape {(n, k)}: groups hold at least 2."
        )
    if not scale.is_floating_point():
        raise TypeError(f"scale must be floating point, got {scale.dtype}.")
    if not scale.is_meta and not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError("scale must be positive and finite.")
    if zero_point is not None:
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"zero_point must have scale's shape {tuple(scale.shape)}, got "
                f"{tuple(zero_point.shape)}."
            )
        if zero_point.is_floating_point() or zero_point.dtype == torch.bool:
            raise TypeError(f"zero_point must be integers, got {zero_point.dtype}.")
    least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    for name, values in (("qdata", qdata), ("zero_point", zero_point)):
        if values is None or values.is_meta or not values.numel():
            continue
        found = int(values.min()), int(values.max())
        if found[0] < least or found[1] > most:
            raise ValueError(
                f"{name} of {weight_bits} bits must lie in {least}..{most}, got "
                f"{found[0]}..{found[1]}."
            )
