# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which samples are learned from, and which of them make a step together."""

from typing import Sequence

import torch

__all__ = ["batches", "held_back"]

# Every so manieth sample judges the iterates, and is not learned from.
_HELD_BACK = 8


def held_back(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples that are learned from, and of those that judge.

    Args:
        count: of all samples. Where there are too few to hold one back, all do both.
    """
    judges = list(range(_HELD_BACK - 1, count, _HELD_BACK))
    if not judges:
        return list(range(count)), list(range(count))
    return [i for i in range(count) if i % _HELD_BACK != _HELD_BACK - 1], judges


def batches(
    taught: Sequence[int], count: int, size: int, generator: torch.Generator
) -> list[list[int]]:
    """The batches of one epoch, each sample that is learned from in one of them.

    All samples are cut into ``size`` segments of neighbours, and a batch takes one of
    each, in a random order of each segment's own. So batches do not depend on how
    many processes there are; and since processes have neighbours, too, all of them
    have as many samples of a batch where their number divides ``size``. Where segments
    hold unequally many, the last batches are smaller.

    Args:
        taught: numbers of the samples that are learned from, ascending.
        count: of all samples, those that are held back with them.
        size: of a batch, at most; 1: a random order of all.
        generator: makes the orders, one after the other.

    Returns:
        Numbers of the samples of each batch, ascending.
    """
    size = min(size, count)
    segments = []
    for index in range(size):
        # Samples are cut among the processes as Team.share_of does it.
        first, end = count * index // size, count * (index + 1) // size
        own = [i for i in taught if first <= i < end]
        order = torch.randperm(len(own), generator=generator)
        segments.append([own[i] for i in order.tolist()])
    return [
        [segment[step] for segment in segments if step < len(segment)]
        for step in range(max(map(len, segments)))
    ]
