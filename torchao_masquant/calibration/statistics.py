# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration keeps of the inputs of a linear: per modality, not per token."""

from dataclasses import dataclass
from typing import Any, Optional

import torch

__all__ = ["InputStatistics", "Moments"]

# Of a sum of float64 squares over a million tokens, with room to spare.
_ROUNDING = 1e-11


@dataclass
class Moments:
    """Sums over the tokens of one modality that reached one input.

    Attributes:
        count: T, number of tokens.
        absmax: (K,) float64, ``max_t |x|``.
        sum: (K,) float64, ``sum_t x``.
        outer: (K, K) float64, ``sum_t x x^T``; None where it is not needed.
    """

    count: int
    absmax: torch.Tensor
    sum: torch.Tensor
    outer: Optional[torch.Tensor]

    @classmethod
    def zeros(cls, width: int, device: torch.device, second: bool) -> "Moments":
        zeros: dict[str, Any] = dict(dtype=torch.float64, device=device)
        return cls(
            0,
            torch.zeros(width, **zeros),
            torch.zeros(width, **zeros),
            torch.zeros(width, width, **zeros) if second else None,
        )

    def update(self, x: torch.Tensor) -> None:
        """Add tokens (T, K) of any floating point type."""
        if x.shape[0] == 0:
            return
        x = x.double()
        self.count += x.shape[0]
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.sum += x.sum(0)
        if self.outer is not None:
            self.outer.addmm_(x.t(), x)

    def mean(self) -> torch.Tensor:
        """(K,) float64, ``E[x]``."""
        return self.sum / self.count

    def covariance(self, centered: bool = True) -> torch.Tensor:
        """(K, K) float64, ``E[x x^T]``, less ``E[x] E[x]^T`` where centered.

        A channel that is constant to within rounding has no covariance: what the
        subtraction leaves of it is noise, and whitening would blow it up.
        """
        assert self.outer is not None
        second = self.outer / self.count
        if not centered:
            return second
        mean = self.mean()
        covariance = second - torch.outer(mean, mean)
        varies = covariance.diagonal() > _ROUNDING * second.diagonal()
        return covariance * torch.outer(varies, varies)


class InputStatistics:
    """Moments of one input tensor that one or more linears are fed.

    The second moments are of the *unsmoothed* input: those of ``x / s`` are
    ``D^-1 C D^-1`` with ``D = diag(s)`` for whatever ``s``, so that one pass over the
    data gives both the maxima that decide the smoothing factors and the covariances
    that whiten the compensation. Float64 holds the scaled entries to 1e-16 relative.

    Args:
        width: K.
        modalities: names, base first.
        second_moments: keep ``sum x x^T`` of the modalities other than the base:
            8 K^2 bytes each.
    """

    def __init__(
        self,
        width: int,
        modalities: tuple[str, ...],
        device: torch.device,
        second_moments: bool,
    ):
        self.modalities = modalities
        self.moments = [
            Moments.zeros(width, device, second_moments and index > 0)
            for index in range(len(modalities))
        ]

    def update(
        self, name: str, x: torch.Tensor, modality_ids: Optional[torch.Tensor]
    ) -> None:
        """Add the tokens of one call.

        Args:
            name: of the linear, for the message.
            x: (T, K).
            modality_ids: (T,) index of each token's modality, negative for a token
                to leave out (padding); None: all base.

        Raises:
            ValueError: a token that is not left out holds nan or inf.
        """
        for index, moments in enumerate(self.moments):
            if modality_ids is None:
                tokens = x if index == 0 else x[:0]
            else:
                tokens = x[modality_ids == index]
            if tokens.numel() and not torch.isfinite(tokens).all():
                raise ValueError(
                    f"{name}: its input holds nan or inf in {self.modalities[index]} "
                    "tokens, so nothing can be calibrated from it; look for the sample "
                    "or the layer before it that overflows."
                )
            moments.update(tokens)
