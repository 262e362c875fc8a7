# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Matrices as large as covariances that are changed a few rows at a time.

Those of a wide input are the largest tensors of a calibration: a second one is not made.
"""

from typing import Callable

import torch

__all__ = ["ROWS", "on_both_sides"]

#: Rows of a matrix (K, K) that are worked on at a time.
ROWS = 128


def on_both_sides(
    matrix: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``M C M^T`` of a square C, in its memory.

    Args:
        matrix: (K, K) C; lost.
        change: rows (R, K) times ``M^T``, in new memory.
    """
    for side in (matrix, matrix.t()):
        for rows in side.split(ROWS):
            rows.copy_(change(rows))
    return matrix
