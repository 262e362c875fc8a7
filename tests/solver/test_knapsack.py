# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The knapsack of a budget: the best there is, and never more than it may take."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchao_masquant.solver import knapsack
from torchao_masquant.solver.knapsack import best_choices

# A damage may be more than a float holds.
_DAMAGE = st.integers(0, 1000).map(float) | st.sampled_from((1e300, float("inf")))
_CHOICE = st.tuples(st.integers(0, 40), _DAMAGE)
_PLACES = st.lists(st.lists(_CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def _sums(places, chosen):
    taken = [place[index] for place, index in zip(places, chosen)]
    return sum(cost for cost, _ in taken), sum(damage for _, damage in taken)


@settings(max_examples=200, deadline=None)
@given(_PLACES, st.integers(0, 120))
def test_it_is_the_best_of_all_combinations(places, more):
    budget = sum(min(cost for cost, _ in place) for place in places) + more
    every = itertools.product(*(range(len(place)) for place in places))
    fitting = [s for c in every if (s := _sums(places, c))[0] <= budget]
    cost, damage = _sums(places, best_choices(places, budget))
    assert cost <= budget
    assert damage == min(damage for _, damage in fitting)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1))
@example(1212, 0.0)
def test_where_sums_are_classed_it_stays_within_the_budget(seed, share):
    """And close to what no choice beats: the best where places may be cut in parts."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1 << 20, (60, 5), generator=generator).sort(1).values
    damages = torch.rand(60, 5, generator=generator).sort(1, descending=True).values
    places = [list(zip(c, d)) for c, d in zip(costs.tolist(), damages.tolist())]
    least, most = costs[:, 0].sum().item(), costs[:, -1].sum().item()
    budget = int(least + share * (most - least))
    cost, damage = _sums(places, best_choices(places, budget))
    assert cost <= budget
    # By Lagrange: for any price of a byte, no fewer damages are to be had. Where hardly
    # anything may be spent, it takes a price that no step is worth.
    bound = max(
        (damages.double() + price * costs).amin(1).sum().item() - price * budget
        for price in torch.logspace(-9, 0, 720).tolist()
    )
    assert damage <= bound + 0.35


def test_a_uniform_choice_is_not_better(monkeypatch):
    """Even with hardly any sums carried on, for those are of no more damage."""
    monkeypatch.setattr(knapsack, "_CARRIED", 16)
    formats = [(4, 1.0), (5, 0.8), (8, 0.1)]
    places = [[(size * c, size * d) for c, d in formats] for size in range(1, 40)]
    for index, (cost, _) in enumerate(formats):
        budget = cost * sum(range(1, 40))
        assert (
            _sums(places, best_choices(places, budget))[1]
            <= _sums(places, [index] * len(places))[1]
        )


def test_a_damage_that_is_no_number_is_the_most():
    nan = float("nan")
    assert best_choices([[(1, nan), (2, 5.0)], [(1, nan), (2, nan)]], 4) == [1, 0]


def test_less_than_the_cheapest_is_refused():
    with pytest.raises(ValueError, match="cheapest choices take 5, the budget is 4"):
        best_choices([[(3, 1.0)], [(2, 0.0), (9, 0.0)]], 4)
