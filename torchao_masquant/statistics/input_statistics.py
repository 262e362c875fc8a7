# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration keeps of the inputs of a linear: per modality, not per token."""

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import torch

from torchao_masquant.statistics.drift import Drift
from torchao_masquant.statistics.squares import add_squares
from torchao_masquant.statistics.token_sample import SAMPLE_TOKENS, TokenSample
from torchao_masquant.threads import threads_for

__all__ = [
    "InputStatistics",
    "Moments",
    "SAMPLE_TOKENS",
    "statistics_bytes",
]

# Relative error of a sum of float64 squares over a million tokens, with room to spare.
ROUNDING = 1e-11


@dataclass
class Moments:
    """Sums over the tokens of one modality that reached one input.

    Attributes:
        count: T, number of tokens.
        amin: (K,) float64, ``min_t x``; inf without a token.
        amax: (K,) float64, ``max_t x``; -inf without a token.
        sum: (K,) float64, ``sum_t x``.
        outer: (K, K) float64, ``sum_t x x^T``; None where it is not needed.
        before: number of tokens that come before these and are counted elsewhere (by
            another process).
        sampled: some of the tokens, in float32; none where ``outer`` is None.
        weight: what the tokens weigh in the sums together; by default their number.
    """

    count: int
    amin: torch.Tensor
    amax: torch.Tensor
    sum: torch.Tensor
    outer: Optional[torch.Tensor]
    sampled: TokenSample
    before: int = 0
    weight: float = -1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            self.weight = float(self.count)

    @property
    def sample(self) -> torch.Tensor:
        """(S, K) float32."""
        return self.sampled.rows

    @classmethod
    def zeros(
        cls, width: int, device: torch.device, second: bool, before: int = 0
    ) -> "Moments":
        zeros: dict[str, Any] = dict(dtype=torch.float64, device=device)
        return cls(
            0,
            torch.full((width,), float("inf"), **zeros),
            torch.full((width,), float("-inf"), **zeros),
            torch.zeros(width, **zeros),
            torch.zeros(width, width, **zeros) if second else None,
            TokenSample.empty(width, dtype=torch.float32, device=device),
            before,
        )

    def update(self, x: torch.Tensor, weights: Optional[torch.Tensor] = None) -> None:
        """Add tokens (T, K) of any floating point type.

        Args:
            weights: (T,) what each weighs in means and covariances, and by how much it is
                the likelier to be sampled; positive. None: ones.
        """
        if x.shape[0] == 0:
            return
        if self.outer is not None:
            self.sampled.add(x, self.before + self.count, weights)
        x = x.double()
        self.count += x.shape[0]
        self.amin = torch.minimum(self.amin, x.amin(0))
        self.amax = torch.maximum(self.amax, x.amax(0))
        if weights is None:
            self.weight += x.shape[0]
            self.sum += x.sum(0)
        else:
            weights = weights.to(x)
            self.weight += weights.sum().item()
            self.sum += weights @ x
            x = x * weights.sqrt()[:, None]
        if self.outer is not None:
            add_squares(self.outer, x)

    def absmax(self, center: Optional[torch.Tensor] = None) -> torch.Tensor:
        """(K,) float64, ``max_t |x - center|``; zeros without a token.

        Args:
            center: (K,), None for zeros.
        """
        if self.count == 0:
            return torch.zeros_like(self.sum)
        shift = torch.zeros_like(self.sum) if center is None else center
        return torch.maximum(self.amax - shift, shift - self.amin)

    def mean(self) -> torch.Tensor:
        """(K,) float64, ``E[x]``."""
        return self.sum / self.weight

    def covariance(self, centered: bool = True, *, spend: bool = False) -> torch.Tensor:
        """(K, K) float64, ``E[x x^T]``, less ``E[x] E[x]^T`` where centered.

        A channel that is constant to within rounding has no covariance: what the
        subtraction leaves of it is noise, and whitening would blow it up.

        Args:
            spend: make it in the memory of ``outer``, which is None afterwards.
        """
        assert self.outer is not None
        covariance = self.outer if spend else self.outer.clone()
        if spend:
            self.outer = None
        covariance /= self.weight
        if not centered:
            return covariance
        mean = self.mean()
        second = covariance.diagonal().clone()
        covariance.addr_(mean, mean, alpha=-1)
        still = covariance.diagonal() <= ROUNDING * second
        covariance[still] = 0
        covariance[:, still] = 0
        return covariance


def statistics_bytes(
    width: int,
    modalities: int,
    second_moments: bool,
    experts: int = 0,
    *,
    drifts: bool = False,
) -> int:
    """Of one input's statistics, whose samples are as large as they get.

    Args:
        width: K.
        modalities: M.
        second_moments: whether covariances and samples are kept.
        experts: that have ranges and sums of their own beside those of all.
        drifts: whether they are kept.
    """
    size = 24 * width * (1 + experts)
    if second_moments:
        size += (8 * width + 4 * SAMPLE_TOKENS) * width
    if drifts:
        size += 8 * (2 * width + SAMPLE_TOKENS + 1) * width
    return size * modalities


class InputStatistics:
    """Moments of one input tensor that one or more linears are fed.

    The second moments are of the *unsmoothed* input: those of ``x / s`` are
    ``D^-1 C D^-1`` with ``D = diag(s)`` for whatever ``s``, so that one pass over the
    data gives both the maxima that decide the smoothing factors and the covariances
    that whiten the compensation. Float64 holds the scaled entries to 1e-16 relative.

    Args:
        width: K.
        modalities: names, base first.
        second_moments: keep ``sum x x^T``, 8 K^2 bytes for each modality, and a sample
            of tokens.
        before: of each modality, see :class:`Moments`; None for none.
        drifts: keep how tokens differ from those of the full-precision stream, twice
            what the second moments take.
    """

    def __init__(
        self,
        width: int,
        modalities: tuple[str, ...],
        device: torch.device,
        second_moments: bool,
        before: Optional[Sequence[int]] = None,
        *,
        drifts: bool = False,
    ):
        self.modalities = modalities
        self.drifts = [Drift.zeros(width, device) for _ in modalities] if drifts else []
        self.moments = [
            Moments.zeros(width, device, second_moments, earlier)
            for earlier in before or [0] * len(modalities)
        ]

    def update(
        self,
        name: str,
        x: torch.Tensor,
        modality_ids: Optional[torch.Tensor],
        weights: Optional[torch.Tensor] = None,
        exact: Optional[torch.Tensor] = None,
    ) -> None:
        """Add the tokens of one call.

        Args:
            name: of the linear, for the message.
            x: (T, K).
            modality_ids: (T,) index of each token's modality, negative for a token
                to leave out (padding); None: all base.
            weights: (T,) see :meth:`Moments.update`.
            exact: (T, K) the tokens in the full-precision stream, where drifts are kept.

        Raises:
            ValueError: a token that is not left out holds nan or inf.
        """
        for index, moments in enumerate(self.moments):
            met = [rows for rows in (x, exact) if rows is not None]
            if modality_ids is None:
                met, own = [rows if index == 0 else rows[:0] for rows in met], weights
            else:
                chosen = modality_ids == index
                met = [rows[chosen] for rows in met]
                own = None if weights is None else weights[chosen]
            tokens = met[0]
            if not all(torch.isfinite(rows).all() for rows in met):
                raise ValueError(
                    f"{name}: its input holds nan or inf in {self.modalities[index]} "
                    "tokens, so nothing can be calibrated from it; look for the sample "
                    "or the layer before it that overflows."
                )
            with threads_for(x.shape[-1]):
                if self.drifts and len(tokens):
                    first = moments.before + moments.count
                    self.drifts[index].update(tokens, met[1], first)
                moments.update(tokens, own)
