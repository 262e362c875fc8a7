# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What "auto" chooses: exponents, separations and ranks."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.options import ALPHAS, SEPARATIONS, SolverOptions
from torchao_masquant.solver.judge import mean_log_error
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.ranks import AUTO_SHARE, allocate, spend_ranks

NAMES = ("text", "vision", "audio")
K = 24


def _problem(seed):
    generator = torch.Generator().manual_seed(seed)
    statistics = InputStatistics(K, NAMES, torch.device("cpu"), True)
    data = []
    for index in range(3):
        scales = torch.exp(torch.randn(K, generator=generator))
        x = torch.randn(120, K, generator=generator) * scales
        data.append(x)
        statistics.update("q", x, torch.full((120,), index))
    weights = {
        name: torch.randn(n, K, generator=generator)
        for name, n in (("q", 16), ("k", 8))
    }
    return data, weights, statistics


def _mean_log_error(weights, layers, data, options):
    """By definition, over all tokens: there are fewer than a sample holds."""
    total, importances = 0.0, (1.0, 1.0, 1.0)
    for name, weight in weights.items():
        quantized = layers[name].quantize(weight, options.number_format, NAMES)
        for index, (x, importance) in enumerate(zip(data, importances)):
            y = torch.ops.masquant.linear(
                x, quantized, torch.full((len(x),), index), None
            ).double()
            exact = x.double() @ weight.double().t()
            energy = exact.var(0, correction=0).sum() * len(x)
            total += importance * math.log((y - exact).square().sum() / energy)
    return total / (2 * sum(importances))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_never_worse_than_what_it_tried(scheme):
    for seed in range(3):
        data, weights, statistics = _problem(seed)
        options = SolverOptions(scheme, rank=2, alpha="auto", separation="auto")
        layers = solve_group(weights, statistics, options)
        chosen = _mean_log_error(weights, layers, data, options)
        assert chosen == pytest.approx(
            mean_log_error(weights, layers, statistics, options), abs=1e-4
        )
        errors = {}
        for alpha, separation in itertools.product(ALPHAS, SEPARATIONS):
            fixed = dataclasses.replace(options, alpha=alpha, separation=separation)
            tried = solve_group(weights, statistics, fixed)
            errors[alpha, separation] = _mean_log_error(weights, tried, data, options)
        assert all(chosen <= errors[alpha, 1.0] + 1e-4 for alpha in ALPHAS)
        alpha = min(ALPHAS, key=lambda a: errors[a, 1.0])
        best = min(errors[alpha, separation] for separation in SEPARATIONS)
        assert chosen == pytest.approx(best, abs=1e-4)


def test_separation_moves_the_factors():
    """At 0 one for all but for the gauge; half way, the geometric mean."""
    _, weights, statistics = _problem(0)
    factors = {}
    for separation in (0.0, 0.5, 1.0):
        options = SolverOptions(rank=0, alpha=0.5, separation=separation)
        layer = solve_group(weights, statistics, options)["q"]
        s = layer.smoothing_factor.double()
        factors[separation] = s / s.log().mean(1, keepdim=True).exp()
    one = factors[0.0]
    torch.testing.assert_close(one, one[:1].expand(3, K), rtol=1e-5, atol=0)
    half = (factors[0.0] * factors[1.0]).sqrt()
    torch.testing.assert_close(factors[0.5], half, rtol=1e-5, atol=0)


SPECTRA = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(1, 2)),
    st.tuples(
        st.lists(st.floats(1e-6, 1e3), max_size=5).map(
            lambda values: sorted(values, reverse=True)
        ),
        st.floats(1e-6, 10),
        st.integers(1, 9),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(SPECTRA, st.integers(0, 60))
def test_allocation_keeps_its_budget(spectra, budget):
    ranks = allocate(spectra, budget)
    assert ranks.keys() == spectra.keys()
    spent = sum(ranks[key] * spectra[key][2] for key in spectra)
    assert spent <= budget
    assert all(0 <= ranks[key] <= len(spectra[key][0]) for key in spectra)
    # What is left unspent would not buy a component anywhere.
    for key, (values, _, cost) in spectra.items():
        assert ranks[key] == len(values) or cost > budget - spent


def test_allocation_goes_where_it_gains():
    spectra = {
        ("steep", 1): ([100.0, 1.0, 1.0], 0.1, 1),
        ("noise", 1): ([1.0, 1.0, 1.0], 1e4, 1),
        ("dear", 1): ([100.0, 1.0, 1.0], 0.1, 4),
    }
    assert allocate(spectra, 3) == {("steep", 1): 3, ("noise", 1): 0, ("dear", 1): 0}
    assert allocate(spectra, 7) == {("steep", 1): 3, ("noise", 1): 0, ("dear", 1): 1}


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_ranks_cost_no_more_than_uniform_ones(scheme):
    _, weights, statistics = _problem(1)
    options = SolverOptions(scheme, rank="auto", alpha=0.5, separation=1.0)
    ranks = spend_ranks([(weights, statistics)], options)
    assert ranks.keys() == weights.keys()
    spent = sum(sum(ranks[n]) * sum(w.shape) for n, w in weights.items())
    uniform = sum(
        2 * sum(w.shape) * max(1, round(AUTO_SHARE * min(w.shape)))
        for w in weights.values()
    )
    assert 0 < spent <= uniform
    layers = solve_group(weights, statistics, options, ranks)
    for name, layer in layers.items():
        assert list(layer.ranks or (0, 0)) == ranks[name]
