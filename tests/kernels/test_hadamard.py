# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rotations by themselves."""

import re

import numpy as np
import pytest
import torch
from hadamard_oracle import hadamard_f64, rotated_f64
from operator_oracle import f64

from torchao_masquant.kernels.hadamard import check_hadamard_size, hadamard_rotate


@pytest.mark.parametrize("size, width", [(2, 6), (4, 4), (64, 192), (1024, 2048)])
def test_against_the_definition(size: int, width: int) -> None:
    torch.manual_seed(size)
    values = torch.randn(5, width) * torch.randn(width).exp()
    expected, slack = rotated_f64(f64(values), np.zeros((5, width)), size)
    assert (np.abs(f64(hadamard_rotate(values, size)) - expected) <= slack).all()
    # Symmetric and orthogonal: in float64 it undoes itself to the last digits.
    twice = hadamard_rotate(hadamard_rotate(values.double(), size), size)
    torch.testing.assert_close(twice, values.double(), rtol=1e-12, atol=1e-12)
    matrix = hadamard_f64(width, size)
    assert (matrix == matrix.T).all()


def test_the_first_matrices() -> None:
    """Written out; that of four is exact, since its factor is a half."""
    rows = hadamard_rotate(torch.eye(4), 4)
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert torch.equal(rows, torch.tensor(signs) / 2)
    values = torch.randn(3, 8)
    assert hadamard_rotate(values, 1) is values


def test_sizes_that_are_none() -> None:
    for size in (0, 3, -2, 6, 16, 4.0, True, "4", None):
        message = re.escape(
            "hadamard_size must be a power of two, at least 2, that divides the input "
            f"width, got hadamard_size={size!r} for an input width of 24."
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_hadamard_size(size, 24)  # type: ignore[arg-type]
