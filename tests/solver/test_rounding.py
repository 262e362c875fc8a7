# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""GPTQ, its joint form and clipping, against slow float64 versions written here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.schemes import Scheme
from torchao_masquant.solver.rounding import gptq_round
from torchao_masquant.solver.shared_weight import round_jointly, round_to_nearest

DOUBLE = torch.float64


def _problem(seed, n=7, k=20, tokens=60):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator, dtype=DOUBLE)
    x = torch.randn(tokens, k, generator=generator, dtype=DOUBLE) @ mixing
    weight = torch.randn(n, k, generator=generator, dtype=DOUBLE)
    return weight, x.t() @ x / tokens


def _textbook(weight, hessian, scale, zero_point, low, high, damping):
    """Column by column; what is left is corrected by the inverse of its own Hessian."""
    weight, hessian = weight.numpy().copy(), hessian.numpy().copy()
    k = weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian[np.diag_indices(k)] += damping * np.diag(hessian).mean()
    width = k // scale.shape[1]
    scale = np.repeat(scale.numpy(), width, 1)
    zero = np.repeat(zero_point.numpy(), width, 1)
    q = np.zeros_like(weight)
    for at, i in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        q[:, i] = np.clip(np.round(weight[:, i] / scale[:, i] + zero[:, i]), low, high)
        error = weight[:, i] - (q[:, i] - zero[:, i]) * scale[:, i]
        weight[:, rest] -= np.outer(error / inverse[0, 0], inverse[0])
    return q


def _error(left, hessian):
    return ((left @ hessian) * left).sum().item()


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("k", "tokens"), [(20, 60), (20, 6), (150, 400)])
def test_equals_the_textbook(k, tokens, asymmetric, groups):
    """Also of a singular Hessian, and over the edges of the blocks."""
    weight, hessian = _problem(0, k=k, tokens=tokens)
    scale = weight.abs().amax() / 7.5 * (1 + torch.rand(7, groups, dtype=DOUBLE))
    zero = torch.randint(-3, 4, (7, groups)).double() * asymmetric
    given_weight, given_hessian = weight.clone(), hessian.clone()
    found = gptq_round(weight, hessian, scale, zero, -8, 7, 0.01)
    assert torch.equal(weight, given_weight) and torch.equal(hessian, given_hessian)
    assert found.dtype == torch.int8
    expected = _textbook(weight, hessian, scale, zero, -8, 7, 0.01)
    # The two compute the same real numbers: they part only where one lies on a
    # boundary to within float64, which a random problem does not.
    np.testing.assert_array_equal(found.numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 8]))
def test_beats_rounding_to_nearest(seed, bits):
    weight, hessian = _problem(seed, n=40)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / (high + 0.5)
    zero = torch.zeros_like(scale)
    q = gptq_round(weight, hessian, scale, zero, low, high, 0.01)
    nearest = (weight / scale).round().clamp(low, high)
    assert q.min() >= low and q.max() <= high
    ours = _error(weight - q * scale, hessian)
    assert ours < 0.8 * _error(weight - nearest * scale, hessian)


def test_a_hessian_of_zeros_is_refused():
    scale = torch.ones(2, 1, dtype=DOUBLE)
    with pytest.raises(ValueError, match="GPTQ needs a Hessian that is not zero"):
        gptq_round(
            torch.ones(2, 4, dtype=DOUBLE),
            torch.zeros(4, 4, dtype=DOUBLE),
            scale,
            0 * scale,
            -8,
            7,
            0.01,
        )


W4 = Scheme("w4a8", 4, 8)


def _modalities(seed, count=3):
    weight, first = _problem(seed, n=30)
    covariances = [first] + [_problem(seed + i, n=1)[1] for i in range(1, count)]
    generator = torch.Generator().manual_seed(seed)
    factors = [
        torch.rand(20, generator=generator, dtype=DOUBLE) + 0.5 for _ in range(count)
    ]
    return weight, covariances, factors


def _objective(weight, factors, covariances, importances, shared, pairs):
    """Sum over modalities of the relative error of the output, from its definition."""
    total, values = 0.0, shared.dequantize()
    for s, c, v, pair in zip(factors, covariances, importances, pairs):
        met = values if pair is None else values + (pair[0] @ pair[1]).t()
        total += v * _error(weight - met / s, c) / _error(weight, c)
    return total


@pytest.mark.parametrize("importances", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.2, 1, 3)])
@pytest.mark.parametrize("paired", [False, True])
def test_joint_rounding_lowers_the_joint_error(paired, importances):
    for seed in range(5):
        weight, covariances, factors = _modalities(10 * seed)
        start = round_to_nearest(weight, factors[0], W4)
        generator = torch.Generator().manual_seed(seed)
        pairs = [None] * 3
        if paired:
            left = torch.randn(20, 2, generator=generator, dtype=DOUBLE) / 4
            pairs[2] = (left, torch.randn(2, 30, generator=generator, dtype=DOUBLE) / 4)
        found = round_jointly(
            weight, factors, pairs, covariances, importances, start, W4
        )
        assert torch.equal(found.scale, start.scale)
        assert found.qdata.min() >= -8 and found.qdata.max() <= 7
        arguments = (weight, factors, covariances, importances)
        before = _objective(*arguments, start, pairs)
        assert _objective(*arguments, found, pairs) < 0.8 * before


def test_a_modality_that_weighs_more_is_served_better():
    weight, covariances, factors = _modalities(3)
    start = round_to_nearest(weight, factors[0], W4)

    def error(importance, index):
        importances = [1.0, 1.0, 1.0]
        importances[index] = importance
        found = round_jointly(
            weight, factors, [None] * 3, covariances, importances, start, W4
        ).dequantize()
        return _error(weight - found / factors[index], covariances[index])

    for index in range(3):
        assert error(100.0, index) < error(1.0, index) < error(0.0, index)


def test_one_modality_is_gptq_of_the_smoothed_weight():
    """Its target differs from W s by nothing: the damping draws to the same."""
    weight, (covariance,), (factor,) = _modalities(5, count=1)
    start = round_to_nearest(weight, factor, W4)
    found = round_jointly(weight, [factor], [None], [covariance], [1.0], start, W4)
    scale = start.scale.double()
    smoothed = covariance / torch.outer(factor, factor)
    expected = gptq_round(weight * factor, smoothed, scale, 0 * scale, -8, 7, 0.01)
    assert torch.equal(found.qdata, expected)


def test_modalities_without_variation_have_no_say():
    weight, covariances, factors = _modalities(6)
    start = round_to_nearest(weight, factors[0], W4)
    nothing = torch.zeros_like(covariances[0])
    alone = round_jointly(
        weight, factors[:1], [None], covariances[:1], [1.0], start, W4
    )
    among = round_jointly(
        weight,
        factors,
        [None] * 3,
        [covariances[0], nothing, nothing],
        [1.0] * 3,
        start,
        W4,
    )
    assert torch.equal(alone.qdata, among.qdata)
    none = round_jointly(
        weight, factors, [None] * 3, [nothing] * 3, [1.0] * 3, start, W4
    )
    assert none is start


@pytest.mark.parametrize("bits", [W4, Scheme("g", 4, 16, 4, False), Scheme("g", 3, 3)])
def test_clipping_never_raises_the_weighted_error_of_a_scale(bits):
    weight, covariances, factors = _modalities(7)
    weight[3, 4] = 40.0
    importance = covariances[0].diagonal() / factors[0] ** 2
    importance[5] = 0
    plain = round_to_nearest(weight, factors[0], bits)
    clipped = round_to_nearest(weight, factors[0], bits, importance)
    smoothed = weight.float() * factors[0].float()
    groups = plain.scale.shape[1]

    def loss(shared):
        left = (shared.dequantize().float() - smoothed).square() * importance.float()
        return left.unflatten(1, (groups, -1)).sum(-1)

    assert (loss(clipped) <= loss(plain) * (1 + 1e-6)).all()
    assert loss(clipped).sum() < loss(plain).sum()
    # Nothing weighs: nothing is clipped.
    even = round_to_nearest(weight, factors[0], bits, torch.zeros(20))
    assert torch.equal(even.qdata, plain.qdata)
