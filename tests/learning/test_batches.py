# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Batches of learning: all samples once, whatever their numbers, and fairly shared."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.conductor.team import Team
from torchao_masquant.learning.batches import batches, held_back


def generator():
    return torch.Generator().manual_seed(3)


def share_of(rank, size, count):
    team = Team()
    team.rank, team.size = rank, size
    return team.share_of(count)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 70), each=st.integers(1, 6), processes=st.integers(1, 5))
def test_every_sample_is_in_one_batch(count, each, processes):
    size = each * processes
    taught, _ = held_back(count)
    found = batches(taught, count, size, generator())
    assert sorted(i for batch in found for i in batch) == taught
    assert all(batch == sorted(batch) and batch for batch in found)
    lengths = [len(batch) for batch in found]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] <= size
    # Segments' samples that are learned from differ by two at most.
    assert all(n == lengths[0] for n in lengths[:-2])
    if processes <= size <= count:
        for rank in range(processes):
            own = share_of(rank, processes, count)
            assert max(sum(i in own for i in batch) for batch in found) <= each


def test_processes_are_equally_busy():
    taught, _ = held_back(32)
    for batch in batches(taught, 32, 4, generator()):
        for rank in range(4):
            assert sum(i in share_of(rank, 4, 32) for i in batch) == 1


def test_batches_of_one_are_a_random_order_of_all():
    """That of results before there were batches."""
    taught, judges = held_back(20)
    assert judges == [7, 15]
    assert taught == [i for i in range(20) if i not in judges]
    order = torch.randperm(18, generator=generator()).tolist()
    assert batches(taught, 20, 1, generator()) == [[taught[i]] for i in order]


def test_epochs_differ():
    taught, _ = held_back(40)
    numbers = generator()
    first, second = (batches(taught, 40, 4, numbers) for _ in range(2))
    assert first != second


def test_a_batch_of_more_than_all():
    taught, _ = held_back(9)
    for size in (9, 12, 1000):
        assert batches(taught, 9, size, generator()) == [taught]


def test_too_few_to_hold_one_back():
    assert held_back(7) == (list(range(7)), list(range(7)))
    assert held_back(8) == (list(range(7)), [7])
