# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is known of one modality's tokens at an input, sinks told from ordinary tokens.

An attention sink holds a thousand times the energy of an ordinary token. One of them in a
row of text moves the mean by many standard deviations of all other tokens, so a shift by
the mean would cost every token its resolution. What has to suit most tokens (where they
lie, how wide channels are, how much rounding adds to them) is therefore found from ordinary
tokens alone; covariances are of all tokens, for a sink's output has to be right, too.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Optional

import torch

from torchao_masquant.kernels.number_formats import number_format
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.rotation import rotated
from torchao_masquant.statistics.input_statistics import InputStatistics, Moments

__all__ = ["ModalityInput", "modality_inputs", "ordinary"]

# Nine tokens of ten keep a squared distance from the median; ordinary tokens are no further
# away than so many times that. A token that more than one in ten is like is no sink.
_FURTHEST = 10.0


@dataclass
class ModalityInput:
    """One modality's tokens at an input of K channels; all float64, unsmoothed.

    Attributes:
        share: of all calibration tokens, times what the modality's error weighs.
        center: (K,) mean of ordinary tokens; zeros where the method does not center.
        tokens: (S, K) sampled tokens, ordinary ones.
        absmax: (K,) ``max |x|`` over all tokens.
        range: (K,) ``max |x - shift|`` over all tokens.
        shift: (K,) what is taken off tokens before they are rounded.
    """

    share: float
    center: torch.Tensor
    tokens: torch.Tensor
    absmax: torch.Tensor
    range: torch.Tensor
    shift: torch.Tensor
    _moments: Moments = field(repr=False)
    _centered: bool = field(repr=False)
    _spend: bool = field(repr=False)

    @cached_property
    def covariance(self) -> torch.Tensor:
        """(K, K) ``E[(x - center) (x - center)^T]`` over all tokens."""
        mean = self._moments.mean()
        found = self._moments.covariance(self._centered, spend=self._spend)
        if self._centered:
            # What is constant to within rounding has no variance about its center either.
            moved = torch.where(found.diagonal() > 0, mean - self.center, 0.0)
            found.addr_(moved, moved)
        return found

    def squared_step(
        self, factor: torch.Tensor, hadamard_size: Optional[int]
    ) -> torch.Tensor:
        """Mean square of the largest value of a shifted, smoothed and rotated token.

        Scalar: the square of a token's quantization step, times that of how many steps
        there are, over ordinary tokens; zero without a token.

        Args:
            factor: (K,) smoothing factor.
            hadamard_size: of the rotation; None for none.
        """
        if not len(self.tokens):
            return torch.zeros_like(factor[0])
        seen = rotated((self.tokens - self.shift) / factor, hadamard_size)
        return seen.abs().amax(1).square().mean()

    def rounding_error(
        self, factor: torch.Tensor, hadamard_size: Optional[int], act_format: str
    ) -> torch.Tensor:
        """Mean square of what rounding to a number format changes.

        Scalar, of a channel of a shifted, smoothed and rotated token, over ordinary tokens
        and channels; zero without a token.

        Args:
            factor: (K,) smoothing factor.
            hadamard_size: of the rotation; None for none.
            act_format: name of the format.
        """
        if not len(self.tokens):
            return torch.zeros_like(factor[0])
        seen = rotated((self.tokens - self.shift) / factor, hadamard_size).float()
        error = number_format(act_format).rounded(seen) - seen
        return error.square().mean().double()


def ordinary(tokens: torch.Tensor) -> torch.Tensor:
    """(S,) bool, which of sampled tokens (S, K) are no sinks."""
    distance = (tokens - tokens.median(0).values).square().sum(1)
    most = distance.quantile(0.9)
    # Where nine in ten are the same token, the others are all that varies.
    return distance <= (_FURTHEST * most if most > 0 else distance.max())


def modality_inputs(
    statistics: InputStatistics, options: SolverOptions, *, spend: bool = False
) -> list[ModalityInput]:
    """Of each modality.

    Args:
        statistics: with second moments.
        options: whose method says what is centered and shifted.
        spend: make covariances in the memory of the second moments, which are lost.
    """
    total = sum(moments.count for moments in statistics.moments)
    weights = options.weights_of(statistics.modalities)
    return [
        _of(moments, weight * moments.count / max(total, 1), options, spend)
        for moments, weight in zip(statistics.moments, weights)
    ]


def _of(
    moments: Moments, share: float, options: SolverOptions, spend: bool
) -> ModalityInput:
    parts = options.procedure
    tokens = moments.sample.double()
    mean = moments.mean()
    center = mean
    if parts.centered or parts.folded:
        if len(tokens):
            kept = ordinary(tokens)
            if len(tokens) < moments.count or not kept.all():
                center = tokens[kept].mean(0)
            tokens = tokens[kept]
    if not parts.centered:
        # Nothing makes up for what rounding does to the mean.
        center = torch.zeros_like(mean)
    shift = center if parts.shift else torch.zeros_like(center)
    own = dataclasses.replace(moments)
    if spend:
        moments.outer = None
    return ModalityInput(
        share,
        center,
        tokens,
        moments.absmax(),
        moments.absmax(shift),
        shift,
        own,
        parts.centered,
        spend,
    )
