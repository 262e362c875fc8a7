# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``gptq_round`` must do on any problem, whatever its order and its blocks."""

import gptq_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.solver.rounding import gptq_round

DAMPING = 0.01


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
        zero = np.round(-(2 ** (bits - 1)) - least / scale)
    else:
        scale = np.abs(blocks).max(-1) / (2**bits - 1) * 2
        zero = np.zeros_like(scale)
    return (
        weight,
        x.T @ x / tokens,
        scale,
        zero,
        -(2 ** (bits - 1)),
        2 ** (bits - 1) - 1,
    )


def _round(weight, hessian, scale, zero, low, high, damping=DAMPING):
    given = [torch.from_numpy(a.copy()) for a in (weight, hessian, scale, zero)]
    kept = [t.clone() for t in given]
    found = gptq_round(*given, low, high, damping)
    assert found.dtype == torch.int8 and found.shape == given[0].shape
    # The caller's tensors are left as they were.
    assert all(torch.equal(a, b) for a, b in zip(given, kept))
    return found.numpy().astype(int)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from([2, 3, 8, 12, 66]),
    st.sampled_from([1e-4, 0.01, 1.0]),
    st.booleans(),
)
def test_equals_the_textbook_on_any_problem(seed, n, k, damping, asymmetric):
    problem = _problem(seed, n, k, asymmetric=asymmetric)
    found = _round(*problem, damping=damping)
    np.testing.assert_array_equal(found, gptq_oracle.gptq(*problem, damping=damping))
    assert problem[-2] <= found.min() and found.max() <= problem[-1]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_better_than_nearest(bits, groups, asymmetric):
    """On the average of random problems, by far, and on nearly every one of them."""
    ratios = []
    for seed in range(20):
        weight, hessian, *grid = _problem(
            seed, groups=groups, bits=bits, asymmetric=asymmetric
        )
        ours = _round(weight, hessian, *grid)
        near = gptq_oracle.nearest(weight, *grid)
        scale, zero = grid[:2]
        ratios.append(
            gptq_oracle.loss(weight, ours, hessian, scale, zero)
            / gptq_oracle.loss(weight, near, hessian, scale, zero)
        )
    assert np.exp(np.mean(np.log(ratios))) < 0.7
    assert np.median(ratios) < 0.8 and np.mean(np.array(ratios) < 1) >= 0.9


def test_permuted_channels():
    """The order of the channels is the Hessian's, not the weight's."""
    weight, hessian, *grid = _problem(3, k=70)
    expected = _round(weight, hessian, *grid)
    order = np.random.default_rng(0).permutation(70)
    found = _round(weight[:, order], hessian[np.ix_(order, order)], *grid)
    np.testing.assert_array_equal(found, expected[:, order])


@pytest.mark.parametrize("constant", [1e-12, 1e12])
def test_the_size_of_the_hessian_does_not_matter(constant):
    weight, hessian, *grid = _problem(4)
    np.testing.assert_array_equal(
        _round(weight, hessian * constant, *grid), _round(weight, hessian, *grid)
    )


def test_without_correlations_it_is_the_nearest():
    weight, hessian, *grid = _problem(5, groups=2)
    np.testing.assert_array_equal(
        _round(weight, np.diag(np.diag(hessian)), *grid),
        gptq_oracle.nearest(weight, *grid),
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
    np.testing.assert_array_equal(
        found, gptq_oracle.gptq(weight, hessian, *grid, damping=DAMPING)
    )
    near = gptq_oracle.nearest(weight, *grid)
    scale, zero = grid[:2]
    assert gptq_oracle.loss(weight, found, hessian, scale, zero) <= gptq_oracle.loss(
        weight, near, hessian, scale, zero
    )
    if kind == "zero channels":
        # Nothing hears them, so nothing moves them.
        np.testing.assert_array_equal(found[:, ::2], near[:, ::2])


def test_a_weight_on_its_grid_stays():
    weight, hessian, scale, zero, low, high = _problem(7, groups=3, asymmetric=True)
    rng = np.random.default_rng(1)
    integers = rng.integers(low, high + 1, weight.shape)
    weight = (integers - np.repeat(zero, 8, 1)) * np.repeat(scale, 8, 1)
    found = _round(weight, hessian, scale, zero, low, high)
    np.testing.assert_array_equal(found, integers)


def test_a_weight_far_outside_of_its_grid():
    weight, hessian, scale, zero, low, high = _problem(8)
    found = _round(1e6 * weight, hessian, scale, zero, low, high)
    assert found.min() == low and found.max() == high


def test_a_hessian_of_zeros_or_of_a_negative_direction():
    weight, hessian, *grid = _problem(9)
    with pytest.raises(ValueError, match="needs a Hessian that is not zero"):
        _round(weight, np.zeros_like(hessian), *grid)
    with pytest.raises(torch.linalg.LinAlgError):
        _round(weight, np.diag([1.0] * 23 + [-0.5]), *grid)
