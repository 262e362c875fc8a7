# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Closed-form smoothing factors."""

import torch

__all__ = ["smoothing_factor"]

_MIN = 1e-5


def smoothing_factor(
    act_absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float
) -> torch.Tensor:
    """``s = max_t |X|^alpha / max_n |W|^(1 - alpha)`` per input channel.

    SmoothQuant's factor (arXiv 2211.10438, eq. 4); with one modality's activations it
    is the start of MAS (arXiv 2603.04800). Clamped to at least 1e-5. A channel that no
    token used has no factor of its own and takes the median of the others: a tiny
    factor would let the first activation there drown its whole token.

    Args:
        act_absmax: (K,) ``max_t |X|``, non-negative.
        weight_absmax: (K,) ``max_n |W|`` over the rows of all weights that share the
            factor.
        alpha: 0..1, how much of the activations' range the weights take over.

    Returns:
        (K,) float64, positive and finite.
    """
    act = act_absmax.double()
    weight = weight_absmax.double().clamp_min(_MIN)
    factor = (act**alpha / weight ** (1 - alpha)).clamp_min(_MIN)
    used = act > 0
    if not used.any():
        return torch.ones_like(factor)
    return torch.where(used, factor, factor[used].median())
