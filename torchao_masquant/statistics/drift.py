# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How an input of the quantized stream differs from the full-precision one's."""

from dataclasses import dataclass

import torch

from torchao_masquant.statistics.squares import add_squares
from torchao_masquant.statistics.token_sample import TokenSample

__all__ = ["Drift"]


@dataclass
class Drift:
    """Sums over the tokens of one modality of ``d = z - x``, all float64.

    ``x`` is a token as a linear will read it, behind quantized linears, and ``z`` the
    same one behind those of full precision.

    Attributes:
        sum: (K,) ``sum_t d``.
        cross: (K, K) ``sum_t d x^T``.
        outer: (K, K) ``sum_t d d^T``.
        sampled: ``d`` of the tokens whose ``x`` is in the modality's own sample.
    """

    sum: torch.Tensor
    cross: torch.Tensor
    outer: torch.Tensor
    sampled: TokenSample

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> "Drift":
        return cls(
            torch.zeros(width, dtype=torch.float64, device=device),
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, width, dtype=torch.float64, device=device),
            TokenSample.empty(width, dtype=torch.float64, device=device),
        )

    def update(self, x: torch.Tensor, exact: torch.Tensor, first: int) -> None:
        """Add tokens.

        Args:
            x: (T, K) of any floating point type.
            exact: (T, K) the same tokens in the full-precision stream.
            first: number of the first of them among the modality's.
        """
        x = x.double()
        difference = exact - x
        self.sampled.add(difference, first)
        self.sum += difference.sum(0)
        self.cross.addmm_(difference.t(), x)
        add_squares(self.outer, difference)
