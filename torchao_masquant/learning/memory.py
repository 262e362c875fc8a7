# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much memory the learning of a block takes."""

from typing import Iterable

from torchao_masquant.options import SolverOptions

__all__ = ["learning_bytes"]

#: Bytes for each number that is learned: where it starts, what is added to it, the value,
#: its gradient, the best one, in float32 (and one more on the way to each of the
#: first three); the batch's sum and its mean in float64; two moments of Adam.
_PER_FLOAT = 4 * 8 + 8 * 2 + 4 * 2


def learning_bytes(
    shapes: Iterable[tuple[int, int]],
    longest: int,
    modalities: int,
    options: SolverOptions,
) -> int:
    """An upper estimate, beside the block's own weights and its forward pass.

    Args:
        shapes: (N, K) of the block's linears.
        longest: tokens of the longest sample.
        modalities: M.
        options: of the solution.
    """
    held, largest = 0, 0
    for n, k in shapes:
        pairs = (modalities - 1) * options.average_rank(n, k)
        groups = -(-k // (options.number_format.group_size or k))
        floats = n * groups + 2 * modalities * k + pairs * (n + k) + modalities * n
        # Integers, twice in int8 (the recipe's and the packed ones), and in float32; a
        # scaled copy is kept for the gradients.
        held += (2 + 4 + 4) * n * k + _PER_FLOAT * floats
        # Each token keeps what comes in, in float32, shifted, smoothed, its sizes, rounded,
        # and scaled back, with the factors that it is smoothed by; and what goes out.
        held += 4 * longest * (7 * k + n + 2 * pairs)
        # One linear's at a time: scales side by side, gradients of the scaled copy, and
        # of what comes in and goes out.
        largest = max(largest, 4 * (4 * n * k + 3 * longest * (n + k)))
    return held + largest
