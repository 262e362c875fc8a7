# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration keeps of what each expert of a mixture reads by itself."""

from typing import Any, Optional, Sequence

import torch

from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.statistics.token_sample import TokenSample

__all__ = ["ExpertMoments", "ExpertStatistics"]


class ExpertMoments:
    """First moments of one modality, expert by expert, beside those of all experts.

    Attributes:
        count: (E,) float64, number of tokens.
        amin: (E, K) float64, inf without a token.
        amax: (E, K) float64, -inf without a token.
        sum: (E, K) float64.
        sampled: (S,) int64, whose each row of the sample of all experts is.
        before: number of tokens of all experts that come before these and are counted
            elsewhere.
    """

    def __init__(self, experts: int, width: int, device: torch.device, before: int = 0):
        zeros: dict[str, Any] = dict(dtype=torch.float64, device=device)
        self.count = torch.zeros(experts, **zeros)
        self.amin = torch.full((experts, width), float("inf"), **zeros)
        self.amax = torch.full((experts, width), float("-inf"), **zeros)
        self.sum = torch.zeros(experts, width, **zeros)
        self.sampled = TokenSample.empty(dtype=torch.int64, device=device)
        self.before = before

    def update(self, x: torch.Tensor, experts: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x: (T, K).
            experts: (T,) int64.
        """
        x = x.double()
        seen = self.total
        places = experts[:, None].expand_as(x)
        self.count.index_add_(0, experts, torch.ones_like(x[:, 0]))
        self.amin.scatter_reduce_(0, places, x, "amin")
        self.amax.scatter_reduce_(0, places, x, "amax")
        self.sum.index_add_(0, experts, x)
        self.sampled.add(experts, self.before + seen)

    @property
    def total(self) -> int:
        """Number of tokens of all experts."""
        return int(self.count.sum())


class ExpertStatistics(InputStatistics):
    """Moments of all experts of a projection together, and first moments of each.

    Args:
        experts: E.
        width: K.
        modalities: names, base first.
        second_moments: of all experts together.
        before: as of :class:`InputStatistics`; a token counts once for each of its
            experts.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        modalities: tuple[str, ...],
        device: torch.device,
        second_moments: bool,
        before: Optional[Sequence[int]] = None,
    ):
        super().__init__(width, modalities, device, second_moments, before)
        self.of_experts = [
            ExpertMoments(experts, width, device, moments.before)
            for moments in self.moments
        ]

    def update_experts(
        self,
        name: str,
        x: torch.Tensor,
        modality_ids: Optional[torch.Tensor],
        experts: torch.Tensor,
    ) -> None:
        """Add the tokens of one call.

        Args:
            experts: (T,) int64, which expert reads each token.

        All else is as in :meth:`InputStatistics.update`.
        """
        self.update(name, x, modality_ids)
        for index, moments in enumerate(self.of_experts):
            if modality_ids is None:
                rows = torch.full_like(experts, index == 0, dtype=torch.bool)
            else:
                rows = modality_ids == index
            moments.update(x[rows], experts[rows])
