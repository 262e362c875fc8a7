# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rotations of what is smoothed: by themselves, and in the operators."""

import re
from typing import Optional

import numpy as np
import pytest
import torch
from hadamard_oracle import hadamard_f64, rotated_f64
from operator_oracle import (
    assert_integers,
    assert_within,
    bfloat16_operations,
    f64,
    ids_for,
    smooth_quantize_f64,
)
from weight_only_problem import Problem

from torchao_masquant.kernels.hadamard import check_hadamard_size, hadamard_rotate

ops = torch.ops.masquant


@pytest.mark.parametrize(
    "size, width", [(2, 6), (4, 4), (8, 24), (64, 192), (1024, 2048)]
)
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


@pytest.mark.parametrize("size", [0, 3, -2, 6, 16, 4.0, True, "4", None])
def test_sizes_that_are_none(size: object) -> None:
    message = re.escape(
        "hadamard_size must be a power of two, at least 2, that divides the input width, "
        f"got hadamard_size={size!r} for an input width of 24."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_hadamard_size(size, 24)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 3, -8, 16])
def test_operators_refuse_them_too(size: int) -> None:
    x, pre_scale = torch.randn(2, 24), torch.ones(1, 24)
    with pytest.raises(ValueError, match=f"hadamard_size must .* got .*{size}"):
        ops.smooth_quantize(x, pre_scale, None, 8, None, size)
    problem = Problem((2, 24, 3), 8, hadamard_size=size)
    with pytest.raises(ValueError, match=f"hadamard_size must .* got .*{size}"):
        ops.weight_only_linear(*problem.args())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize("size, width", [(2, 50), (4, 36), (16, 48), (128, 640)])
def test_smooth_quantize(
    size: int, width: int, act_bits: int, shifted: bool, dtype: torch.dtype
) -> None:
    """The shift is taken off before the rotation, which meets float32 values."""
    torch.manual_seed(width)
    x, pre_scale = torch.randn(23, width).to(dtype), torch.randn(3, width).exp()
    shift = torch.randn(3, width) if shifted else None
    ids = ids_for(23, 3)
    given: list[Optional[torch.Tensor]] = [ids, None]
    for these in given:
        q, scale = ops.smooth_quantize(x, pre_scale, these, act_bits, shift, size)
        expected = smooth_quantize_f64(x, pre_scale, these, act_bits, shift, size)
        assert_integers(q, expected)
        quant_max = 2 ** (act_bits - 1) - 1
        slack = expected.slack.max(-1, keepdims=True) * expected.scale / quant_max
        assert (np.abs(f64(scale) - expected.scale) <= slack).all()


@pytest.mark.parametrize("act_bits", [8, 4])
def test_an_outlier_no_longer_decides_the_step(act_bits: int) -> None:
    """Of one channel of a thousand, a block of 64 keeps an eighth."""
    x = torch.randn(4, 64)
    x[:, 17] = 1000.0
    _, bare = ops.smooth_quantize(x, torch.ones(1, 64), None, act_bits)
    _, rotated = ops.smooth_quantize(x, torch.ones(1, 64), None, act_bits, None, 64)
    assert (rotated < bare / 7.5).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_shows_and_stays_alone(value: float) -> None:
    x, pre_scale = torch.randn(5, 32), torch.ones(1, 32)
    clean_q, clean_scale = ops.smooth_quantize(x, pre_scale, None, 8, None, 8)
    x[3, 5] = value
    q, scale = ops.smooth_quantize(x, pre_scale, None, 8, None, 8)
    assert not torch.isfinite(scale[3]).any()
    rest = [0, 1, 2, 4]
    assert torch.equal(q[rest], clean_q[rest])
    assert torch.equal(scale[rest], clean_scale[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize("size, width", [(2, 62), (16, 48), (128, 256), (512, 512)])
def test_weight_only_linear(
    size: int, width: int, tokens: int, weight_bits: int, dtype: torch.dtype
) -> None:
    """The product and the pair both read rotated tokens."""
    problem = Problem((tokens, width, 7), weight_bits, dtype=dtype, hadamard_size=size)
    operations = problem.operations + bfloat16_operations(problem.x)
    y = ops.weight_only_linear(*problem.args())
    assert_within(y, *problem.expected(), operations)
    y = ops.weight_only_linear(*problem.args(ids=None))
    assert_within(y, *problem.expected(base_only=True), operations)
