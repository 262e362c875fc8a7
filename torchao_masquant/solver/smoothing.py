# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Closed-form smoothing factors."""

from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.modality_input import ModalityInput

__all__ = [
    "RESOLUTION",
    "WeightSizes",
    "factors_of_ranges",
    "smoothing_factor",
    "smoothing_factors",
]

_MIN = 1e-5

#: A bfloat16 activation is known to no better than this share of its channel's range, so
#: that what a shift leaves of a constant is not smoothed as if it were a signal.
RESOLUTION = 2.0**-8


@dataclass
class WeightSizes:
    """How large the input channels of weights are, over all rows; (K,) float64 each."""

    absmax: torch.Tensor
    rms: torch.Tensor

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> "WeightSizes":
        """Of (N_i, K) weights that share an input."""
        maxima = [weight.abs().amax(0).double() for weight in weights.values()]
        rows = sum(len(weight) for weight in weights.values())
        squares = [weight.double().square().sum(0) for weight in weights.values()]
        return cls(
            torch.stack(maxima).amax(0),
            (torch.stack(squares).sum(0) / max(rows, 1)).sqrt(),
        )


def smoothing_factors(
    inputs: Sequence[ModalityInput],
    sizes: WeightSizes,
    alpha: float,
    separation: float,
    options: SolverOptions,
    channels: Optional[torch.Tensor] = None,
) -> list[torch.Tensor]:
    """(K,) float64 of each modality.

    A rotation spreads what a channel holds over its block, so that a token's step follows
    its root mean square and a scale of the weight that of a row: there the factor is made
    of those. At an exponent of a half it then makes the product of both sums of squares
    least. Without a rotation the largest value decides, as SmoothQuant has it.

    Args:
        inputs: of each modality, base first.
        sizes: of the weights.
        alpha: exponent of the activations.
        separation: how far a modality's factor goes from that of all tokens to that of
            its own, geometrically; not at all where activations are not rounded, which
            gain nothing from a factor of their own.
        options: of the solution.
        channels: (K,) number of the channel that each has its factor from, where factors
            are to be folded; None: nothing can take them, and they are ones.
    """
    if options.procedure.folded:
        if channels is None:
            return [torch.ones_like(sizes.absmax)] * len(inputs)
        ranges = [_of_channels(i.absmax, channels) for i in inputs]
        of_weights = _of_channels(sizes.absmax, channels)
        return factors_of_ranges(ranges, of_weights, alpha, 0.0)
    if options.number_format.weight_only:
        separation = 0.0
    if options.hadamard_size_of(len(sizes.rms)) is None:
        ranges = [torch.maximum(i.range, RESOLUTION * i.absmax) for i in inputs]
        return factors_of_ranges(ranges, sizes.absmax, alpha, separation)
    own = [_rms(i) for i in inputs]
    return _between(own, _unified(own, sizes.rms), sizes.rms, alpha, separation)


def _of_channels(sizes: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """(K,) the largest of all that have one number."""
    channels = channels.to(sizes.device)
    largest = torch.zeros(int(channels.max()) + 1, dtype=sizes.dtype).to(sizes.device)
    return largest.scatter_reduce(0, channels, sizes, "amax")[channels]


def _unified(own: Sequence[torch.Tensor], weight_rms: torch.Tensor) -> torch.Tensor:
    """(K,) root mean square over modalities, each relative to what it makes in all.

    A token is rounded relative to itself, so that a modality which is louder in every
    channel needs no other factor for it.
    """
    squares = torch.stack(list(own)).square()
    energies = (squares * weight_rms.square()).sum(1)
    heard = energies > 0
    if not heard.any():
        return squares.mean(0).sqrt()
    relative = squares[heard] / energies[heard, None]
    return (relative.mean(0) * energies[heard].mean()).sqrt()


def _rms(modality: ModalityInput) -> torch.Tensor:
    """(K,) of ordinary tokens; zeros without a token."""
    if not len(modality.tokens):
        return torch.zeros_like(modality.absmax)
    whole = modality.tokens.square().mean(0).sqrt()
    left = (modality.tokens - modality.shift).square().mean(0).sqrt()
    return torch.maximum(left, RESOLUTION * whole)


def factors_of_ranges(
    ranges: Sequence[torch.Tensor],
    weight_sizes: torch.Tensor,
    alpha: float,
    separation: float,
) -> list[torch.Tensor]:
    """(K,) float64 of each modality.

    Args:
        ranges: (K,) of each modality's channels.
        weight_sizes: (K,) of the weights' channels.
        alpha: exponent of the activations.
        separation: 0..1.
    """
    unified = torch.stack(list(ranges)).amax(0)
    return _between(ranges, unified, weight_sizes, alpha, separation)


def _between(
    own: Sequence[torch.Tensor],
    unified: torch.Tensor,
    weight_sizes: torch.Tensor,
    alpha: float,
    separation: float,
) -> list[torch.Tensor]:
    return [
        smoothing_factor(
            r**separation * unified ** (1 - separation), weight_sizes, alpha
        )
        for r in own
    ]


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
