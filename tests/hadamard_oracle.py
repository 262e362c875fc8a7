# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rotations by Hadamard matrices in numpy float64, from their definition."""

import math
from typing import Optional

import numpy as np

__all__ = ["hadamard_f64", "rotated_f64"]

_UNIT = 2.0**-24


def hadamard_f64(in_features: int, size: Optional[int]) -> np.ndarray:
    """(K, K) block-diagonal, of Sylvester's matrices; the identity for None or 1."""
    block = np.ones((1, 1))
    while block.shape[0] < (size or 1):
        block = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), block)
    blocks = in_features // block.shape[0]
    return np.kron(np.eye(blocks), block / math.sqrt(block.shape[0]))


def rotated_f64(
    values: np.ndarray, slack: np.ndarray, size: Optional[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rotated rows (..., K), and how far float32 may be from them.

    A result is a sum of b terms, each of which goes through log2(b) additions and a
    product with a rounded factor.

    Args:
        slack: how far float32 may be from ``values`` themselves.
    """
    if size in (None, 1):
        return values, slack
    rotation = hadamard_f64(values.shape[-1], size)
    operations = (math.log2(size) + 2) * 1.001
    rounded = slack + operations * _UNIT * (np.abs(values) + slack)
    return values @ rotation, rounded @ np.abs(rotation)
