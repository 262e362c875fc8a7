# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""GPTQ for a Hessian: what it must do on any problem, whatever its order and its blocks."""

import gptq_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.options import Scheme
from torchao_masquant.solver.shared_weight import JointHessian, SharedWeight


def _problem(seed, n=6, k=24, groups=1, bits=4, asymmetric=False, tokens=None):
    """A weight, a Hessian of correlated tokens, and grids that hold the weight."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, k))
    tokens = tokens or 3 * k
    x = rng.normal(size=(tokens, k)) @ rng.normal(size=(k, k)) * rng.uniform(0.1, 3, k)
    blocks = weight.reshape(n, groups, -1)
    if asymmetric:
        weight += 0.7
        blocks = weight.reshape(n, groups, -1)
        least, most = blocks.min(-1).clip(max=0), blocks.max(-1).clip(min=0)
        scale = (most - least) / (2**bits - 1)
        zero = np.round(-(2 ** (bits - 1)) - least.astype(float) / scale)
    else:
        scale = np.abs(blocks).max(-1) / (2**bits - 1) * 2
        zero = np.zeros_like(scale)
    # Grids are held in float32 and int8.
    scale = scale.astype(np.float32).astype(float)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return weight, x.T @ x / tokens, scale, zero.clip(low, high), low, high


def _round(weight, hessian, scale, zero, low, high, noise=0.0):
    start = SharedWeight(
        torch.zeros(weight.shape, dtype=torch.int8),
        torch.from_numpy(scale).float(),
        torch.from_numpy(zero).to(torch.int8) if zero.any() else None,
    )
    bits = Scheme("given", int(high).bit_length() + 1, 8)
    found = JointHessian(
        torch.from_numpy(hessian.copy()), torch.tensor(noise, dtype=torch.float64)
    ).rounded(torch.from_numpy(weight.copy()), start, bits)
    assert found.scale is start.scale and found.zero_point is start.zero_point
    assert found.qdata.dtype == torch.int8 and found.qdata.shape == weight.shape
    return found.qdata.numpy().astype(int)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from([2, 3, 8, 12, 66]),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.booleans(),
)
def test_equals_the_textbook_on_any_problem(seed, n, k, noise, asymmetric):
    problem = _problem(seed, n, k, asymmetric=asymmetric)
    noise *= np.trace(problem[1]) / k
    found = _round(*problem, noise=noise)
    gptq_oracle.assert_gptq(found, *problem, noise=noise)


@pytest.mark.parametrize(
    ("k", "tokens", "asymmetric", "groups"),
    [
        pytest.param(20, 60, True, 5, id="groups with zero points"),
        pytest.param(20, 6, False, 1, id="a singular Hessian"),
        pytest.param(20, 6, True, 5, id="a singular Hessian, groups"),
        pytest.param(150, 400, False, 5, id="several blocks, groups"),
        pytest.param(150, 400, True, 1, id="several blocks, a zero point"),
    ],
)
def test_equals_the_textbook(k, tokens, asymmetric, groups):
    """Also of a singular Hessian, and over the edges of the blocks."""
    problem = _problem(0, n=7, k=k, groups=groups, asymmetric=asymmetric, tokens=tokens)
    gptq_oracle.assert_gptq(_round(*problem), *problem)


def test_the_textbook_tells_other_integers():
    """So that the tests above can fail."""
    problem = _problem(1)
    with pytest.raises(AssertionError):
        gptq_oracle.assert_gptq(gptq_oracle.nearest(problem[0], *problem[2:]), *problem)


@pytest.mark.parametrize("constant", [2.0**-40, 2.0**40])
def test_the_size_of_the_hessian_does_not_matter(constant):
    weight, hessian, *grid = _problem(4)
    np.testing.assert_array_equal(
        _round(weight, hessian * constant, *grid), _round(weight, hessian, *grid)
    )


@pytest.mark.parametrize("kind", ["zero channels", "rank one", "repeated channels"])
def test_a_singular_hessian(kind):
    weight, hessian, *grid = _problem(6)
    if kind == "zero channels":
        hessian[::2] = hessian[:, ::2] = 0
    elif kind == "rank one":
        direction = np.linspace(-1, 2, 24)
        hessian = np.outer(direction, direction)
    else:
        hessian = np.kron(np.eye(12), np.ones((2, 2)))
    found = _round(weight, hessian, *grid)
    gptq_oracle.assert_gptq(found, weight, hessian, *grid)
    near = gptq_oracle.nearest(weight, *grid)
    scale, zero = grid[:2]
    assert gptq_oracle.loss(weight, found, hessian, scale, zero) <= gptq_oracle.loss(
        weight, near, hessian, scale, zero
    )
    if kind == "zero channels":
        # Nothing hears them, so nothing moves them.
        off = np.abs(found[:, ::2] - weight[:, ::2] / scale).max()
        assert off <= 0.5 + 2.0**-20


def test_a_weight_far_outside_of_its_grid():
    weight, hessian, scale, zero, low, high = _problem(8)
    found = _round(1e6 * weight, hessian, scale, zero, low, high)
    assert found.min() == low and found.max() == high


def test_a_hessian_of_zeros_or_of_a_negative_direction():
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    assert not JointHessian(zeros, torch.tensor(1.0).double()).active
    weight, hessian, *grid = _problem(9)
    with pytest.raises(torch.linalg.LinAlgError):
        _round(weight, np.diag([1.0] * 23 + [-0.5]), *grid)
