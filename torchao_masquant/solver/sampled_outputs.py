# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Some of the outputs of wide linears, to choose by."""

from typing import Mapping, Sequence

import torch

__all__ = ["SAMPLED_OUTPUTS", "sampled_outputs", "sampled_rank"]

#: Outputs of a linear that exponents and separations are tried on, at most.
SAMPLED_OUTPUTS = 1024


def sampled_outputs(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Evenly spaced rows of each weight, all of those that have no more than enough.

    Args:
        weights: name to (N, K).
    """
    sampled = {}
    for name, weight in weights.items():
        count = min(len(weight), SAMPLED_OUTPUTS)
        rows = torch.arange(count, device=weight.device) * len(weight) // max(count, 1)
        sampled[name] = weight if count == len(weight) else weight[rows]
    return sampled


def sampled_rank(rank: int, whole: Sequence[int], some: Sequence[int]) -> int:
    """That of a pair for some outputs: the same, in moderation.

    What pairs are for are a few directions of the input, which some of the outputs show as
    all of them do. A pair that could make up for any error would tell nothing, so that a
    large rank is cut: to a quarter of all that there is, or, if that is more, to the share
    that it has of the whole.

    Args:
        rank: for the weight.
        whole: (N, K) of the weight.
        some: of a sample of it.
    """
    share = round(rank * min(some) / max(min(whole), 1))
    return min(rank, max(share, min(some) // 4))
