# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``rank="auto"``: who gets components, and that they cost what was promised."""

import math

import group_oracle
import numpy as np
import pytest
import torch
from group_oracle import data, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.options import AUTO_SHARE, SolverOptions
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.ranks import allocate, spend_ranks

_VALUES = st.lists(
    st.floats(1e-3, 1e3, allow_nan=False, allow_subnormal=False), max_size=6
).map(lambda values: sorted(values, reverse=True))
_PLACES = st.lists(
    st.tuples(_VALUES, st.floats(1e-4, 1e2), st.integers(1, 50)), max_size=5
)


def _greedy(places, budget):
    """One component after the other, looking through all places every time."""
    ranks = dict.fromkeys(places, 0)
    closed = set()
    while True:
        gains = {}
        for key, (values, floor, cost) in places.items():
            taken = ranks[key]
            if key in closed or taken == len(values):
                continue
            before = floor + math.fsum(values[taken:])
            after = floor + math.fsum(values[taken + 1 :])
            gains[key] = math.log(before / after) / cost
        if not gains:
            return ranks, gains
        best = max(gains, key=lambda key: gains[key])
        if places[best][2] > budget:
            closed.add(best)
            continue
        budget -= places[best][2]
        ranks[best] += 1


@settings(max_examples=100, deadline=None)
@given(_PLACES, st.integers(0, 300))
def test_allocation_is_greedy_and_keeps_its_budget(places, budget):
    places = {(f"linear {i}", 1): place for i, place in enumerate(places)}
    ranks = allocate(places, budget)
    assert ranks.keys() == places.keys()
    spent = sum(ranks[key] * cost for key, (_, _, cost) in places.items())
    assert spent <= budget
    for key, (values, _, cost) in places.items():
        assert 0 <= ranks[key] <= len(values)
        # Nothing that still fits is left over.
        assert ranks[key] == len(values) or cost > budget - spent
    expected, _ = _greedy(places, budget)
    if ranks != expected:
        # Equal gains may go to either: what they leave is the same.
        assert _left(places, ranks) == pytest.approx(_left(places, expected), rel=1e-9)


def _left(places, ranks):
    return sum(
        math.log(floor + math.fsum(values[ranks[key] :]))
        for key, (values, floor, _) in places.items()
    )


def test_noise_gets_nothing():
    """A gain of a millionth beside real ones, while anything else is to be had."""
    places = {
        ("noise", 1): ([1e-6] * 20, 100.0, 1),
        ("signal", 1): ([1.0] * 20, 1.0, 5),
    }
    assert allocate(places, 60) == {("noise", 1): 0, ("signal", 1): 12}
    assert allocate({("none", 1): ([], 1.0, 1)}, 9) == {("none", 1): 0}
    # A component that takes nothing away is not worth its bytes.
    assert allocate({("idle", 1): ([0.0, 0.0], 1.0, 1)}, 9) == {("idle", 1): 0}
    assert allocate({}, 9) == {}


# Whole groups.


def _quiet(seed):
    """A group whose vision tokens never vary: no pair could do anything there."""
    tokens, weights = data(3, seed)
    tokens[1] = tokens[1][:1].expand_as(tokens[1]).contiguous()
    return tokens, {f"still {name}": w for name, w in weights.items()}


def _cost(groups, ranks):
    return sum(
        sum(ranks[name]) * sum(weight.shape)
        for weights, _ in groups
        for name, weight in weights.items()
    )


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4", "w4a16"])
def test_bytes_are_those_of_a_uniform_rank(scheme):
    options = SolverOptions(
        scheme,
        rank="auto",
        alpha=0.5,
        separation=1.0,
        group_size=8 if scheme == "w4a16" else None,
    )
    problems = [data(3, 0), _quiet(1)]
    groups = [(weights, statistics(tokens)) for tokens, weights in problems]
    ranks = spend_ranks(groups, options)
    assert list(ranks) == [name for weights, _ in groups for name in weights]
    uniform = {
        name: [max(1, round(AUTO_SHARE * min(weight.shape)))] * 2
        for weights, _ in groups
        for name, weight in weights.items()
    }
    assert 0 < _cost(groups, ranks) <= _cost(groups, uniform)
    for name, (vision, audio) in ranks.items():
        if name.startswith("still"):
            assert vision == 0
        assert vision >= 0 and audio >= 0
    for (tokens, weights), (_, found) in zip(problems, groups):
        layers = solve_group(weights, found, options, ranks)
        for name, layer in layers.items():
            layer.check(name, 3)
            assert list(layer.ranks) == ranks[name] or not any(ranks[name])


def test_a_modality_that_weighs_nothing_gets_nothing():
    tokens, weights = data(3)
    options = SolverOptions(
        rank="auto", alpha=0.5, separation=1.0, modality_weights={"vision": 0}
    )
    ranks = spend_ranks([(weights, statistics(tokens))], options)
    vision, audio = np.sum(list(ranks.values()), 0)
    assert vision == 0 < audio


def test_it_goes_where_the_error_is_no_noise():
    """One modality's outliers make its rounded activations all of its error."""
    tokens, weights = data(3, seed=3)
    # In another channel each: no factor can make up for them.
    generator = torch.Generator().manual_seed(0)
    loud = torch.randint(0, group_oracle.K, (len(tokens[1]),), generator=generator)
    tokens[1][torch.arange(len(loud)), loud] += 3e4
    options = SolverOptions("w4a8", rank="auto", alpha=0.5, separation=1.0)
    ranks = spend_ranks([(weights, statistics(tokens))], options)
    vision, audio = np.sum(list(ranks.values()), 0)
    assert audio > vision


def test_better_than_uniform_where_places_differ():
    """In the mean of the logarithms that it spends its bytes by."""
    gains = []
    for seed in range(2):
        problems = [data(3, 10 * seed), _quiet(10 * seed + 1)]
        groups = [(weights, statistics(tokens)) for tokens, weights in problems]
        options = SolverOptions(rank="auto", alpha=0.5, separation=1.0)
        ranks = spend_ranks(groups, options)
        even = {name: [1, 1] for name in ranks}
        totals = []
        for chosen in (ranks, even):
            errors = []
            for (tokens, weights), (_, found) in zip(problems, groups):
                layers = solve_group(weights, found, options, chosen)
                errors += _log_errors(layers, weights, tokens, options.number_format)
            totals.append(np.mean(errors))
        gains.append(totals[1] - totals[0])
    assert np.mean(gains) > 0


def _log_errors(layers, weights, tokens, bits):
    """Of the modalities that vary and can have a pair."""
    found = []
    for name, weight in weights.items():
        for index, x in enumerate(tokens):
            exact = x.double().numpy() @ weight.double().numpy().T
            energy = ((exact - exact.mean(0)) ** 2).sum()
            if index == 0 or energy < 1e-9:
                continue
            y = group_oracle.output(layers[name], weight, x, index, bits)
            found.append(np.log(((y - exact) ** 2).sum() / energy))
    return found
