# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whitening, the low-rank pair (theorem 2), the gauge and the smoothing factor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.options import resolve_rank
from torchao_masquant.solver.compensation import (
    error_spectrum,
    low_rank_pair,
    pair_of_product,
    whitening,
)
from torchao_masquant.solver.gauge import gauge
from torchao_masquant.solver.smoothing import smoothing_factor


def _problem(seed, tokens=60, k=14, n=9):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mixing
    difference = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return x, difference


def _error(x, difference, l1, l2):
    return (x @ (difference.t() - l1 @ l2)).norm().item()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([60, 8]))
def test_no_other_pair_of_the_same_rank_is_better(seed, rank, tokens):
    """Theorem 2, with full and with singular covariances."""
    x, difference = _problem(seed, tokens)
    covariance = x.t() @ x / len(x)
    l1, l2 = low_rank_pair(difference, rank, covariance)
    ours = _error(x, difference, l1, l2)
    slack = 1e-9 * (x @ difference.t()).norm().item()

    u, s, vt = torch.linalg.svd(difference.t(), full_matrices=False)
    assert ours <= _error(x, difference, u[:, :rank] * s[:rank], vt[:rank]) + slack
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        # Alternating least squares from a random start.
        down = torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64)
        target = x @ difference.t()
        for _ in range(15):
            up = torch.linalg.pinv(x @ down) @ target
            down = torch.linalg.pinv(x) @ target @ torch.linalg.pinv(up)
        assert ours <= _error(x, difference, down, up) + slack
    # And it is the tail of the singular values of X D^T.
    tail = torch.linalg.svdvals(x @ difference.t())[rank:].norm().item()
    assert ours == pytest.approx(tail, abs=1e-7 * (1 + tail) + slack)


def test_whitening_inverts_on_the_range_only():
    x, _ = _problem(0, tokens=5)
    covariance = x.t() @ x
    transform, inverse = whitening(covariance)
    assert transform.shape[0] == 5
    torch.testing.assert_close(
        transform @ inverse, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(transform.t() @ transform, covariance)
    assert whitening(torch.zeros(4, 4))[0].shape == (0, 4)
    assert low_rank_pair(torch.ones(3, 4), 2, torch.zeros(4, 4)) is None


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_pair_is_balanced_whatever_the_scale(scale):
    x, difference = _problem(1)
    l1, l2 = low_rank_pair(difference, 4, x.t() @ x * scale)
    torch.testing.assert_close(l1.norm(dim=0), l2.norm(dim=1))


def test_zero_difference_and_rank_zero():
    x, difference = _problem(2)
    covariance = x.t() @ x
    assert low_rank_pair(torch.zeros_like(difference), 3, covariance) is None
    assert low_rank_pair(difference, 0, covariance) is None
    assert low_rank_pair(difference, 999, covariance)[0].shape[1] == 9


@pytest.mark.parametrize("tokens", [60, 8])
def test_of_more_outputs_than_inputs_and_of_fewer(tokens):
    """The two ways to the same error, a whitening that is handed over and one found."""
    for outputs in (3, 12, 30):
        x, _ = _problem(3, tokens)
        generator = torch.Generator().manual_seed(outputs)
        shape = (outputs, x.shape[1])
        difference = torch.randn(shape, generator=generator, dtype=torch.float64)
        covariance = x.t() @ x / len(x)
        tail = torch.linalg.svdvals(x @ difference.t())[2:].norm().item()
        for whitened in (None, whitening(covariance)):
            pair = low_rank_pair(difference, 2, covariance, whitened)
            assert _error(x, difference, *pair) == pytest.approx(tail, rel=1e-7)
            spectrum = error_spectrum(difference, covariance, whitened)
            expected = torch.linalg.svdvals(x @ difference.t()).square() / len(x)
            count = min(len(spectrum), len(expected))
            torch.testing.assert_close(
                spectrum[:count],
                expected[:count],
                rtol=0,
                atol=1e-12 * expected[0].item(),
            )


@pytest.mark.parametrize("spread", [1.0, 1e6])
@pytest.mark.parametrize("kind", ["zero channels", "repeated channel", "few tokens"])
def test_whitening_of_a_singular_covariance(kind, spread):
    """What no token uses is left out, whatever the channels' scales."""
    x, _ = _problem(5, tokens=4 if kind == "few tokens" else 60)
    k = x.shape[1]
    if kind == "zero channels":
        x[:, [0, 3]] = 0
    elif kind == "repeated channel":
        x[:, 4] = x[:, 1]
    x = x * torch.logspace(0, 1, k, base=spread, dtype=torch.float64)
    rank = {"zero channels": k - 2, "repeated channel": k - 1, "few tokens": 4}[kind]
    transform, inverse = whitening(x.t() @ x)
    assert transform.shape == (rank, k) and inverse.shape == (k, rank)
    covariance = x.t() @ x
    size = covariance.diagonal().sqrt()
    # A channel of zeros counts as one of deviation 1.
    size = torch.where(size > 0, size, 1.0)
    left = (transform.t() @ transform - covariance).abs()
    # Of correlations, numerical noise and what is cut: below 1e-10 of k.
    assert (left <= 1e-10 * k * torch.outer(size, size)).all()
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(transform @ inverse, identity, rtol=0, atol=1e-9)
    assert torch.isfinite(inverse).all()


@pytest.mark.parametrize("outputs", [5, 14])
def test_of_a_product_that_is_known(outputs):
    x, _ = _problem(6)
    x = x * torch.logspace(0, 1, x.shape[1], base=1e3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(outputs)
    shape = (outputs, x.shape[1])
    difference = torch.randn(shape, generator=generator, dtype=torch.float64)
    covariance = x.t() @ x
    pair = pair_of_product(difference, 3, difference @ covariance)
    expected = low_rank_pair(difference, 3, covariance)
    assert all(torch.equal(a, b) for a, b in zip(pair, expected))
    values = torch.linalg.svdvals(x @ difference.t())
    error = _error(x, difference, *pair)
    assert error == pytest.approx(values[3:].norm().item(), rel=1e-7)
    nothing = torch.zeros_like(difference)
    assert pair_of_product(nothing, 3, nothing) is None


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, 0), (3, 3), (999, 64), (0.0, 0), (0.05, 3), (0.001, 1), (1.0, 64)],
)
def test_resolve_rank(rank, expected):
    assert resolve_rank(rank, 64, 100) == expected


@pytest.mark.parametrize("rank", [-1, -0.1, 1.5, math.nan])
def test_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="rank"):
        resolve_rank(rank, 64, 100)


@pytest.mark.parametrize("rank", [True, "5", None])
def test_a_rank_that_is_no_number(rank):
    with pytest.raises(TypeError, match="rank must be an int or a float"):
        resolve_rank(rank, 64, 100)


def test_gauge_is_the_least_squares_minimiser():
    x, w = _problem(3)
    v = w * 0.4 + 0.05 * torch.randn_like(w)
    s = torch.rand(w.shape[1], dtype=torch.float64) + 0.5
    covariance = torch.cov(x.t(), correction=0)
    found = gauge([w], [v * s], s, covariance)
    centered = x - x.mean(0)

    def loss(g):
        return (centered @ (w - g * v).t()).norm().item()

    for step in np.geomspace(1e-4, 1, 20):
        assert loss(found) <= loss(found * (1 + step))
        assert loss(found) <= loss(found * (1 - step))
    assert found == pytest.approx(2.5, rel=0.2)


def test_gauge_of_nothing_is_one():
    w = torch.randn(3, 4)
    s = torch.ones(4)
    assert gauge([w], [w], s, torch.zeros(4, 4)) == 1
    assert gauge([w], [torch.zeros_like(w)], s, torch.eye(4)) == 1
    assert gauge([w], [-w], s, torch.eye(4)) == 1
    assert gauge([torch.zeros_like(w)], [w], s, torch.eye(4)) == 1


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_smoothing_factor(alpha):
    act = torch.tensor([4.0, 1e4, 1e-12, 0.0, 2.0])
    weight = torch.tensor([1.0, 0.25, 1.0, 1.0, 0.0])
    expected = [
        max(a**alpha / max(w, 1e-5) ** (1 - alpha), 1e-5)
        for a, w in zip(act.double().tolist(), weight.double().tolist())
    ]
    # The channel that no token used takes the (lower) median of the others.
    expected[3] = sorted(expected[:3] + expected[4:])[1]
    found = smoothing_factor(act, weight, alpha)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_smoothing_factor_of_a_silent_input_is_one():
    assert torch.equal(
        smoothing_factor(torch.zeros(3), torch.rand(3), 0.5),
        torch.ones(3, dtype=torch.float64),
    )
