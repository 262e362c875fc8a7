# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Low-rank pairs in 8 bits."""

import numpy as np
import pytest
import torch
from tensor_oracle import UNIT, f64, make

from torchao_masquant.tensor_subclasses import quantize_low_rank_pair

# (K, R, N)
SHAPES = [(2, 1, 1), (16, 5, 6), (33, 1, 7), (31, 4, 1), (64, 24, 40)]


def pair(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of components whose sizes differ by orders of magnitude, as an SVD's do."""
    k, r, n = shape
    generator = torch.Generator().manual_seed(sum(shape))
    size = 10.0 ** -torch.arange(r).float().remainder(6)
    l1 = torch.randn(k, r, generator=generator) * size
    return l1, torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int, int]) -> None:
    l1, l2 = pair(shape)
    q1, q2, scale = quantize_low_rank_pair(l1, l2)
    assert q1.dtype == q2.dtype == torch.int8 and scale.dtype == torch.float32
    assert q1.shape == l1.shape and q2.shape == l2.shape and scale.shape == shape[1:2]
    assert q1.is_contiguous() and q2.is_contiguous()
    down = np.abs(f64(l1)).max(0, keepdims=True) / 127
    up = np.abs(f64(l2)).max(1, keepdims=True) / 127
    # Two divisions and their product.
    np.testing.assert_allclose(f64(scale), (down.T * up)[:, 0], rtol=3.01 * UNIT)
    for q, values, step in ((q1, l1, down), (q2, l2, up)):
        levels = f64(values) / step
        # The scale's division, its reciprocal and the product with it.
        assert (np.abs(q.numpy() - levels) <= 0.5 + 3.01 * UNIT * 127).all()
        # Both ends are in use, and nothing beyond them.
        assert np.abs(q.numpy()).max() == 127 and q.min() >= -127
    assert (q1.abs().amax(0) == 127).all() and (q2.abs().amax(1) == 127).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_of_the_product(shape: tuple[int, int, int]) -> None:
    """Half a step of each side, times the other side's size."""
    l1, l2 = (f64(t) for t in pair(shape))
    q1, q2, scale = quantize_low_rank_pair(*pair(shape))
    down = np.abs(l1).max(0) / 254 * np.ones_like(l1)
    up = np.abs(l2).max(1, keepdims=True) / 254 * np.ones_like(l2)
    bound = down @ np.abs(l2) + np.abs(l1) @ up + down @ up
    error = np.abs((f64(q1) * f64(scale)) @ f64(q2) - l1 @ l2)
    assert (error <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_again_it_stays(shape: tuple[int, int, int]) -> None:
    q1, q2, scale = quantize_low_rank_pair(*pair(shape))
    again = quantize_low_rank_pair(q1 * scale, q2.float())
    assert torch.equal(again[0], q1) and torch.equal(again[1], q2)
    torch.testing.assert_close(again[2], scale, rtol=4 * UNIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    l1, l2 = (t.to(dtype) for t in pair((16, 5, 6)))
    for a, b in zip(
        quantize_low_rank_pair(l1, l2), quantize_low_rank_pair(l1.float(), l2.float())
    ):
        assert torch.equal(a, b)


def test_components_of_zeros() -> None:
    """A singular value of zero: no scale of its own, no nan, and a product of zero."""
    l1, l2 = pair((16, 5, 6))
    clean = quantize_low_rank_pair(l1, l2)
    l1[:, 1], l2[3] = 0, 0
    q1, q2, scale = quantize_low_rank_pair(l1, l2)
    assert torch.isfinite(scale).all()
    product = q1.double() * scale.double() @ q2.double()
    rest = [0, 2, 4]
    expected = clean[0][:, rest].double() * clean[2][rest].double()
    assert torch.equal(product, expected @ clean[1][rest].double())


def test_in_a_tensor() -> None:
    """It holds what the function gives, and says so."""
    case = make(low_rank_bits=8)
    assert case.l1 is not None and case.l2 is not None
    q1, q2, scale = quantize_low_rank_pair(case.l1, case.l2)
    assert torch.equal(case.tensor.l1, q1) and torch.equal(case.tensor.l2, q2)
    assert torch.equal(case.tensor.low_rank_scale, scale)
    assert case.tensor.low_rank_bits == 8
    # Nothing to quantize: 16 bits are what a pair would have.
    assert make(low_rank_bits=8, ranks=()).tensor.low_rank_bits == 16
    assert make(low_rank_bits=8, ranks=()).tensor.low_rank_scale is None
