# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The rotation of :mod:`torchao_masquant.kernels.hadamard` as products of matrices."""

from typing import Optional

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.solver.in_place import on_both_sides

__all__ = ["halves", "rotated", "rotated_both"]


def halves(hadamard_size: int) -> tuple[int, int]:
    """Sizes of two matrices whose Kronecker product is that of the rotation."""
    inner = 1 << (hadamard_size.bit_length() // 2)
    return hadamard_size // inner, inner


def rotated(rows: torch.Tensor, hadamard_size: Optional[int]) -> torch.Tensor:
    """``rows @ H``: what :func:`hadamard_rotate` gives, to within rounding.

    Of matrices as large as covariances two small products, for ``H_ab`` is the Kronecker
    product of ``H_a`` and ``H_b``, take a tenth of the time of its stages.

    Args:
        rows: (..., K) floating point.
        hadamard_size: None for none.
    """
    if hadamard_size is None:
        return rows
    outer, inner = halves(hadamard_size)
    blocks = rows.unflatten(-1, (-1, outer, inner)) @ _matrix(inner, rows)
    if outer > 1:
        blocks = _matrix(outer, rows) @ blocks
    return blocks.flatten(-3)


def rotated_both(matrix: torch.Tensor, hadamard_size: Optional[int]) -> torch.Tensor:
    """``H C H`` of a symmetric (K, K), in its memory."""
    if hadamard_size is None:
        return matrix
    return on_both_sides(matrix, lambda rows: rotated(rows, hadamard_size))


def _matrix(size: int, like: torch.Tensor) -> torch.Tensor:
    return hadamard_rotate(torch.eye(size, dtype=like.dtype, device=like.device), size)
