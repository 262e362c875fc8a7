# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Numerical corners of the solver, against float64 searches of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant import SCHEMES
from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.options import METHODS, SolverOptions
from torchao_masquant.solver import smoothing
from torchao_masquant.solver.compensation import low_rank_pair, whitening
from torchao_masquant.solver.gauge import gauge
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.smoothing import smoothing_factor

DOUBLE = torch.float64


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _rank_of(matrix):
    return int(np.linalg.matrix_rank(np.asarray(matrix), tol=1e-9))


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


def _covariance(kind):
    x = torch.randn(40, 6, generator=_generator(1), dtype=DOUBLE)
    if kind == "rank one":
        x = x[:, :1] * torch.tensor([[3.0, -1, 0.5, 1e-3, 7, 2]], dtype=DOUBLE)
    elif kind == "repeated channel":
        x[:, 4] = x[:, 1]
    elif kind == "dead channel":
        x[:, 2] = 0
    elif kind == "one token":
        x = x[:1]
    elif kind == "scales":
        x = x * torch.tensor([1e-2, 1, 1e2, 1, 1, 1e-1], dtype=DOUBLE)
    covariance = x.t() @ x / len(x)
    if kind == "negative eigenvalue":
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        eigenvalues[0] = -1e-13 * eigenvalues[-1]
        covariance = (vectors * eigenvalues) @ vectors.t()
    return covariance


KINDS = {
    "full": 6,
    "scales": 6,
    "rank one": 1,
    "one token": 1,
    "repeated channel": 5,
    "dead channel": 5,
    "negative eigenvalue": 5,
}


@pytest.mark.parametrize(("kind", "rank"), KINDS.items())
def test_whitening_on_the_range(kind, rank):
    covariance = _covariance(kind)
    transform, inverse = whitening(covariance)
    assert transform.shape == (rank, 6) and inverse.shape == (6, rank)
    identity = torch.eye(rank, dtype=DOUBLE)
    # T C^+ T^T = I, T T^+ = I on the range of C.
    pseudo = torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True)
    torch.testing.assert_close(
        transform @ pseudo @ transform.t(), identity, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(transform @ inverse, identity, rtol=0, atol=1e-9)
    # T^T T is C again, but for what was dropped: below 1e-10 of the largest.
    left = (transform.t() @ transform - covariance).norm()
    assert left <= 1e-10 * covariance.norm() * 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_pair_of_any_covariance(kind, rank):
    """Never inf or nan, and the error is the weighted tail."""
    covariance = _covariance(kind)
    difference = torch.randn(4, 6, generator=_generator(2), dtype=DOUBLE)
    l1, l2 = low_rank_pair(difference, rank, covariance)
    assert torch.isfinite(l1).all() and torch.isfinite(l2).all()
    assert l1.shape[1] == l2.shape[0] == min(rank, 4, KINDS[kind])
    left = (difference.t() - l1 @ l2).numpy()
    error = np.trace(left.T @ covariance.numpy() @ left)
    # The same from the eigenvalues of D C D^T: no whitening, no SVD.
    weighted = torch.linalg.eigvalsh(difference @ covariance @ difference.t())
    tail = weighted[: max(0, 4 - rank)].sum().item()
    assert error == pytest.approx(tail, abs=1e-9 * weighted[-1].item())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from(list(KINDS)))
def test_no_random_pair_or_neighbour_is_better(seed, rank, kind):
    covariance = _covariance(kind)
    generator = _generator(seed)
    difference = torch.randn(5, 6, generator=generator, dtype=DOUBLE)
    l1, l2 = low_rank_pair(difference, rank, covariance)

    def error(down, up):
        left = difference.t() - down @ up
        return ((covariance @ left) * left).sum().item()

    ours = error(l1, l2)
    slack = 1e-9 * error(torch.zeros_like(l1), l2)
    for size in (1e-3, 1e-1, 1, 10):
        down = l1 + size * torch.randn(l1.shape, generator=generator, dtype=DOUBLE)
        up = l2 + size * torch.randn(l2.shape, generator=generator, dtype=DOUBLE)
        assert ours <= error(down, up) + slack
        # The best partner of a changed half is no better either.
        weighted = down.t() @ covariance @ down
        best = torch.linalg.pinv(weighted) @ down.t() @ covariance @ difference.t()
        assert ours <= error(down, best) + slack


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_pair_fits_half_precision(scale):
    """Balanced halves: covariances of 1e14 or 1e-14 do not over- or underflow."""
    x = torch.randn(40, 6, generator=_generator(3), dtype=DOUBLE) * scale
    difference = torch.randn(5, 6, generator=_generator(4), dtype=DOUBLE)
    l1, l2 = low_rank_pair(difference, 3, x.t() @ x)
    halves = l1.half(), l2.half()
    product = halves[0].double() @ halves[1].double()
    bound = 2.1 * 2**-11 * (l1.abs() @ l2.abs())
    assert ((product - l1 @ l2).abs() <= bound).all()


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


# Whole groups.

K, WIDTHS, TOKENS = 20, {"q": 16, "k": 8, "v": 8}, 150


def _problem(dtype=torch.float32, modalities=3, seed=0):
    generator = _generator(seed)
    names = ("text", "vision", "audio")[:modalities]
    statistics = InputStatistics(K, names, torch.device("cpu"), second_moments=True)
    tokens = []
    for index in range(modalities):
        x = torch.randn(TOKENS, K, generator=generator)
        if index:
            x = x * (0.3 * index) * torch.rand(K, generator=generator)
            x[:, 3 * index] += 12.0
        tokens.append(x.to(dtype))
        statistics.update("q", tokens[-1], torch.full((TOKENS,), index))
    weights = {
        name: (0.1 * torch.randn(n, K, generator=generator)).to(dtype)
        for name, n in WIDTHS.items()
    }
    return tokens, weights, statistics


@pytest.mark.parametrize("constants", [(0.25, 8.0), (64.0, 2.0**-10)])
@pytest.mark.parametrize("scheme", [n for n, s in SCHEMES.items() if not s.weight_only])
def test_the_constant_of_a_factor_is_free(monkeypatch, scheme, constants):
    """Whatever s_m is multiplied by before solving, everything comes out the same.

    Where modalities have factors of their own: one for all leaves nothing to fit.
    """
    monkeypatch.setitem(globals(), "K", SCHEMES[scheme].group_size or K)
    tokens, weights, statistics = _problem()
    options = SolverOptions(scheme, "masquant", rank=3, alpha=0.5, separation=1.0)
    plain = solve_group(weights, statistics, options)
    multiples = iter((1.0, *constants))
    monkeypatch.setattr(
        smoothing,
        "smoothing_factor",
        lambda *arguments: smoothing_factor(*arguments) * next(multiples),
    )
    scaled = solve_group(weights, statistics, options)
    assert next(multiples, None) is None
    for name, layer in plain.items():
        other = scaled[name]
        # Powers of two, so that float64 gives the same bits but for the sums inside
        # eigh and svd; one step of float32 where those end up across a boundary.
        torch.testing.assert_close(
            other.smoothing_factor, layer.smoothing_factor, rtol=2**-22, atol=0
        )
        product = layer.l1.double() @ layer.l2.double()
        bound = 4 * 2**-9 * (layer.l1.double().abs() @ layer.l2.double().abs())
        left = (other.l1.double() @ other.l2.double() - product).abs()
        assert (left <= bound).all()
        size = layer.modality_bias.abs().max()
        assert (other.modality_bias - layer.modality_bias).abs().max() < 2**-7 * size


def test_the_published_method_does_depend_on_it(monkeypatch):
    """So that the test above can fail."""
    _, weights, statistics = _problem(modalities=2)
    options = SolverOptions("w4a8", "masquant-paper", rank=3)
    plain = solve_group(weights, statistics, options)
    multiples = iter((1.0, 8.0))
    monkeypatch.setattr(
        smoothing,
        "smoothing_factor",
        lambda *arguments: smoothing_factor(*arguments) * next(multiples),
    )
    scaled = solve_group(weights, statistics, options)
    factors = scaled["q"].smoothing_factor[1] / plain["q"].smoothing_factor[1]
    torch.testing.assert_close(factors, torch.full((K,), 8.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_scheme_and_type(monkeypatch, method, scheme, dtype):
    monkeypatch.setitem(globals(), "K", SCHEMES[scheme].group_size or K)
    _, weights, statistics = _problem(dtype)
    layers = solve_group(weights, statistics, SolverOptions(scheme, method, rank=2))
    pair_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for name, layer in layers.items():
        layer.check(name, 3)
        assert layer.shape == tuple(weights[name].shape)
        assert layer.smoothing_factor.dtype == torch.float32
        assert (layer.smoothing_factor > 0).all()
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())
        per_modality = method.startswith("masquant")
        assert layer.smoothing_factor.shape[0] == (3 if per_modality else 1)
        assert layer.ranks == ((2, 2) if per_modality else ())
        if per_modality:
            assert layer.l1.dtype == layer.l2.dtype == pair_dtype
        assert (layer.modality_bias is not None) == (method == "masquant")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(method, bad):
    _, weights, statistics = _problem()
    weights["k"][3, 4] = bad
    with pytest.raises(ValueError, match="k: its weight holds nan or inf"):
        solve_group(weights, statistics, SolverOptions(method=method))


def test_rank_zero_leaves_the_bias():
    tokens, weights, statistics = _problem(modalities=2)
    layer = solve_group(weights, statistics, SolverOptions(rank=0))["q"]
    assert layer.ranks == () and layer.l1 is None and layer.l2 is None
    assert layer.modality_bias.shape == (2, 16) and layer.modality_bias.any()


def test_huge_means_do_not_drown_the_variation():
    """A mean of 1e4 beside a variation of 1: the pair fits the variation."""
    generator = _generator(9)
    x = torch.randn(TOKENS, K, generator=generator, dtype=torch.float32)
    x[:, 2] += 1e4
    statistics = InputStatistics(K, ("text", "vision"), torch.device("cpu"), True)
    statistics.update("q", torch.randn(TOKENS, K, generator=generator), None)
    for chunk in x.split(17):
        statistics.update("q", chunk, torch.ones(len(chunk), dtype=torch.long))
    exact = np.cov(x.double().numpy().T, bias=True)
    found = statistics.moments[1].covariance().numpy()
    # E[x^2] = 1e8 in float64, summed over 150 tokens: 1e8 * 2^-53 * 150, at most.
    assert abs(found[2, 2] - exact[2, 2]) < 1e8 * 2**-53 * TOKENS
    assert np.abs(found - exact).max() < 1e8 * 2**-53 * TOKENS
    assert _rank_of(found) == _rank_of(exact) == K
