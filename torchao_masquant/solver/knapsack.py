# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One choice for each place, so that all together do least damage for their cost."""

from typing import Sequence

import torch

__all__ = ["Priced", "best_choices"]

#: Cost, which is not negative, and damage of a choice; one that is nan is infinite.
Priced = tuple[int, float]

# Sums that are carried from place to place. Few places have no more: then the result is
# the best that there is.
_CARRIED = 1 << 13


def best_choices(places: Sequence[Sequence[Priced]], budget: int) -> list[int]:
    """The choices of least damage whose costs together keep a budget.

    Sums of costs and damages of the places so far, of which none is worse than another in
    both, are carried on. Where they become too many, costs are put into classes as wide
    as each other, and the least damage of each is kept: costs stay exact, so that the
    budget always is.

    Args:
        places: of each, what there is to choose from.
        budget: in units of cost.

    Returns:
        The number of the choice of each place.

    Raises:
        ValueError: the budget is less than the cheapest choices take.
    """
    least = [min(cost for cost, _ in choices) for choices in places]
    if sum(least) > budget:
        raise ValueError(
            f"the cheapest choices take {sum(least)}, the budget is {budget}."
        )
    costs = torch.zeros(1, dtype=torch.int64)
    damages = torch.zeros(1, dtype=torch.float64)
    came_from: list[torch.Tensor] = []
    rest = sum(least)
    for choices, cheapest in zip(places, least):
        rest -= cheapest
        own = torch.tensor([cost for cost, _ in choices])
        own_damages = _beside_least([damage for _, damage in choices])
        # Numbered by what came before, then by the choice.
        costs = (costs[:, None] + own).flatten()
        damages = (damages[:, None] + own_damages).flatten()
        kept = _undominated(costs, damages, budget - rest)
        costs, damages = costs[kept], damages[kept]
        came_from.append(kept)
    state, found = len(costs) - 1, []
    for choices, kept in zip(reversed(places), reversed(came_from)):
        state, choice = divmod(int(kept[state]), len(choices))
        found.append(choice)
    return found[::-1]


def _beside_least(damages: Sequence[float]) -> torch.Tensor:
    """What each choice of a place does more than the least one, which all would do: a sum
    would be rounded to it where it is large. Of infinite ones none does more."""
    found = torch.tensor(damages, dtype=torch.float64).nan_to_num(float("inf"))
    more = found - found.min()
    return torch.where(found == found.min(), 0.0, more)


def _undominated(costs: torch.Tensor, damages: torch.Tensor, most: int) -> torch.Tensor:
    """Numbers of the sums to carry on, from the cheapest to the one of least damage."""
    # Of equal costs the least damage comes first.
    order = torch.argsort(damages, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    order = order[costs[order] <= most]
    ranked = damages[order]
    before = torch.cummin(ranked, 0).values.roll(1)
    before[0] = float("inf")
    fewer = ranked < before
    # The cheapest stays, whatever it does: it may be all that there is room for.
    fewer[0] = True
    order = order[fewer]
    if len(order) <= _CARRIED:
        return order
    costs = costs[order]
    classes = (costs - costs[0]) * _CARRIED // (costs[-1] - costs[0] + 1)
    # Damage falls with cost: the last of a class has its least. The first stays here, too.
    last = classes.diff(append=classes[-1:] + 1) > 0
    last[0] = True
    return order[last]
