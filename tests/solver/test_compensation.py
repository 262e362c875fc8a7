# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Smoothing factor, whitening, the low-rank pair (theorem 2) and the gauge.

Each against a search or a formula of its own, in float64.
"""

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

DOUBLE = torch.float64


def _generator(seed):
    return torch.Generator().manual_seed(seed)


# Smoothing factors.


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.3, 1.0, 77.0, 6e4]), min_size=1),
    st.sampled_from([0, 0.25, 0.5, 0.85, 1]),
    st.integers(0, 999),
)
def test_smoothing_factor_is_positive_finite_and_clamped(act, alpha, seed):
    weight = torch.rand(len(act), generator=_generator(seed))
    weight[::3] = 0
    found = smoothing_factor(torch.tensor(act), weight, alpha)
    act = torch.tensor(act).double().tolist()
    expected = [
        max(a**alpha / max(w, 1e-5) ** (1 - alpha), 1e-5)
        for a, w in zip(act, weight.double().tolist())
    ]
    used = sorted(e for e, a in zip(expected, act) if a > 0)
    for index, a in enumerate(act):
        if a == 0:
            # torch's median of an even number is the lower of the middle two.
            expected[index] = used[(len(used) - 1) // 2] if used else 1.0
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert (found >= 1e-5).all() and torch.isfinite(found).all()


# Whitening.


def _covariance(kind, spread):
    """Of tokens whose channels' sizes lie ``spread`` apart."""
    x = torch.randn(40, 6, generator=_generator(1), dtype=DOUBLE)
    if kind == "rank one":
        x = x[:, :1] * torch.tensor([[3.0, -1, 0.5, 1e-3, 7, 2]], dtype=DOUBLE)
    elif kind == "repeated channel":
        x[:, 4] = x[:, 1]
    elif kind == "dead channels":
        x[:, [0, 3]] = 0
    elif kind == "few tokens":
        x = x[:4]
    elif kind == "one token":
        x = x[:1]
    covariance = x.t() @ x / len(x)
    if kind == "negative eigenvalue":
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        eigenvalues[0] = -1e-13 * eigenvalues[-1]
        covariance = (vectors * eigenvalues) @ vectors.t()
    size = torch.logspace(0, 1, 6, base=spread, dtype=DOUBLE)
    return covariance * torch.outer(size, size)


KINDS = {
    "full": 6,
    "rank one": 1,
    "few tokens": 4,
    "one token": 1,
    "repeated channel": 5,
    "dead channels": 4,
    "negative eigenvalue": 5,
}
of_every_covariance = pytest.mark.parametrize(
    ("kind", "spread"), [(kind, spread) for kind in KINDS for spread in (1.0, 1e6)]
)


@of_every_covariance
def test_whitening_on_the_range(kind, spread):
    """What no token uses is left out, whatever the channels' sizes."""
    covariance, rank = _covariance(kind, spread), KINDS[kind]
    transform, inverse = whitening(covariance)
    assert transform.shape == (rank, 6) and inverse.shape == (6, rank)
    assert torch.isfinite(inverse).all()
    identity = torch.eye(rank, dtype=DOUBLE)
    torch.testing.assert_close(transform @ inverse, identity, rtol=0, atol=1e-9)
    # T^T T is C again, but for numerical noise and what is cut: of correlations, below
    # 1e-10 of their number. A channel of zeros counts as one of deviation 1.
    size = covariance.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)
    left = (transform.t() @ transform - covariance).abs()
    assert (left <= 1e-10 * 6 * torch.outer(size, size)).all()


def _problem(seed, tokens=60, k=14, n=9):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mixing
    difference = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return x, difference


def _error(x, difference, l1, l2):
    return (x @ (difference.t() - l1 @ l2)).norm().item()


def test_nothing_to_whiten_or_to_make_up_for():
    assert whitening(torch.zeros(4, 4))[0].shape == (0, 4)
    assert low_rank_pair(torch.ones(3, 4), 2, torch.zeros(4, 4)) is None
    x, difference = _problem(2)
    covariance = x.t() @ x
    nothing = torch.zeros_like(difference)
    assert low_rank_pair(nothing, 3, covariance) is None
    assert pair_of_product(nothing, 3, nothing) is None
    assert low_rank_pair(difference, 0, covariance) is None
    assert low_rank_pair(difference, 999, covariance)[0].shape[1] == 9


# The pair.


@of_every_covariance
def test_pair_of_any_covariance(kind, spread):
    """Never inf or nan, and the error is the weighted tail: the least that there is."""
    covariance = _covariance(kind, spread)
    difference = torch.randn(4, 6, generator=_generator(2), dtype=DOUBLE)
    for rank in (1, 3, 50):
        l1, l2 = low_rank_pair(difference, rank, covariance)
        assert torch.isfinite(l1).all() and torch.isfinite(l2).all()
        assert l1.shape[1] == l2.shape[0] == min(rank, 4, KINDS[kind])
        left = (difference.t() - l1 @ l2).numpy()
        error = np.trace(left.T @ covariance.numpy() @ left)
        # The same from the eigenvalues of D C D^T: no whitening, no SVD.
        weighted = torch.linalg.eigvalsh(difference @ covariance @ difference.t())
        tail = weighted[: max(0, 4 - rank)].sum().item()
        assert error == pytest.approx(tail, abs=1e-9 * weighted[-1].item())


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_pair_fits_half_precision(scale):
    """Balanced halves: covariances of 1e14 or 1e-14 do not over- or underflow."""
    x = torch.randn(40, 6, generator=_generator(3), dtype=DOUBLE) * scale
    difference = torch.randn(5, 6, generator=_generator(4), dtype=DOUBLE)
    l1, l2 = low_rank_pair(difference, 3, x.t() @ x)
    torch.testing.assert_close(l1.norm(dim=0), l2.norm(dim=1))
    halves = l1.half(), l2.half()
    product = halves[0].double() @ halves[1].double()
    bound = 2.1 * 2**-11 * (l1.abs() @ l2.abs())
    assert ((product - l1 @ l2).abs() <= bound).all()


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


def test_what_is_no_rank():
    for rank in (-1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="rank"):
            resolve_rank(rank, 64, 100)
    for rank in (True, "5", None):
        with pytest.raises(TypeError, match="rank must be an int or a float"):
            resolve_rank(rank, 64, 100)


# The gauge.


def test_one_gauge_for_all_linears_of_an_input():
    """The minimum of the joint loss by a search, and none of the single ones."""
    generator = _generator(5)
    x = torch.randn(80, 7, generator=generator, dtype=DOUBLE) + 30
    centered = x - x.mean(0)
    covariance = centered.t() @ centered / len(x)
    factor = torch.rand(7, generator=generator, dtype=DOUBLE) + 0.1
    weights, shared = [], []
    for rows, size, constant in ((4, 1e-3, 0.2), (9, 1.0, 0.5), (2, 1e3, 1.7)):
        weight = size * torch.randn(rows, 7, generator=generator, dtype=DOUBLE)
        noise = size * 0.3 * torch.randn(rows, 7, generator=generator, dtype=DOUBLE)
        weights.append(weight)
        shared.append((constant * weight + noise) * factor)

    def loss(g, chosen=slice(None)):
        return sum(
            ((centered @ (w - g * v / factor).t()).norm() / (centered @ w.t()).norm())
            .square()
            .item()
            for w, v in zip(weights[chosen], shared[chosen])
        )

    # A parabola in g: three points give its minimum.
    low, middle, high = loss(0.0), loss(1.0), loss(2.0)
    curvature, slope = (high - 2 * middle + low) / 2, (4 * middle - high - 3 * low) / 2
    found = gauge(weights, shared, factor, covariance)
    assert found == pytest.approx(-slope / (2 * curvature), rel=1e-9)
    singles = [gauge([w], [v], factor, covariance) for w, v in zip(weights, shared)]
    assert min(singles) < found < max(singles)
    # Scaling a linear's weights and integers together changes nothing in the joint g.
    again = gauge(
        [weights[0] * 1e4, *weights[1:]],
        [shared[0] * 1e4, *shared[1:]],
        factor,
        covariance,
    )
    assert again == pytest.approx(found, rel=1e-12)


def test_gauge_of_nothing_is_one():
    w = torch.randn(3, 4)
    s = torch.ones(4)
    assert gauge([w], [w], s, torch.zeros(4, 4)) == 1
    assert gauge([w], [torch.zeros_like(w)], s, torch.eye(4)) == 1
    assert gauge([w], [-w], s, torch.eye(4)) == 1
    assert gauge([torch.zeros_like(w)], [w], s, torch.eye(4)) == 1
