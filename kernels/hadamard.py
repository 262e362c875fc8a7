# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rotations of neighbouring channels by normalized Hadamard matrices.

``H`` is block-diagonal, of K / b matrices ``S_b / sqrt(b)`` of Sylvester's construction,
``S_2b = [[S_b, S_b], [S_b, -S_b]]``. It is symmetric and orthogonal, so it undoes itself.
An outlier of one channel is spread over its block of b, which makes the largest value of
a token, and with it the step of its integers, smaller.

All backends compute it in float32 by the same additions, so that the integers which are
rounded from it are the same: in stages h = 1, 2, 4, ... b / 2, each of which replaces
values a and c of a block, h channels apart, with ``a + c`` and ``a - c``; then by one
multiplication with ``1 / sqrt(b)``.
"""

import math

import torch

__all__ = ["check_hadamard_size", "hadamard_rotate"]


def check_hadamard_size(hadamard_size: int, in_features: int) -> None:
    """Raise unless blocks of a rotation divide the input channels of a weight.

    Args:
        hadamard_size: b, neighbours that are rotated together.
        in_features: K.

    Raises:
        ValueError: it is no power of two of at least 2, or does not divide K.
    """
    size = hadamard_size
    whole = type(size) is int and size >= 2 and size & (size - 1) == 0
    if not whole or in_features % size:
        raise ValueError(
            "hadamard_size must be a power of two, at least 2, that divides the input "
            f"width, got hadamard_size={size!r} for an input width of {in_features}."
        )


def hadamard_rotate(values: torch.Tensor, hadamard_size: int) -> torch.Tensor:
    """``values @ H``, which is ``H`` applied to each row.

    Args:
        values: (..., K) floating point; computed in its own type.
        hadamard_size: b, a power of two that divides K; 1 leaves all as it is.

    Returns:
        (..., K) of the same type, differentiable.

    Raises:
        ValueError: the size is no power of two, or does not divide K.
    """
    if hadamard_size == 1:
        return values
    check_hadamard_size(hadamard_size, values.shape[-1])
    shape = values.shape
    half = 1
    while half < hadamard_size:
        pairs = values.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
        a, c = pairs.unbind(-2)
        values = torch.stack((a + c, a - c), dim=-2)
        half *= 2
    return values.reshape(shape) * (1 / math.sqrt(hadamard_size))
