# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much tokens vary, a sample at a time."""

from typing import Optional

import torch

__all__ = ["TokenVariation", "tokens_of"]


def tokens_of(
    y: torch.Tensor, ids: Optional[torch.Tensor], modality: int
) -> torch.Tensor:
    """(T, H) those of one modality.

    Args:
        y: (..., H).
        ids: (...) modality ids; None: all base.
        modality: its id.
    """
    flat = y.reshape(-1, y.shape[-1])
    if ids is None:
        return flat if modality == 0 else flat[:0]
    return flat[ids.reshape(-1) == modality]


class TokenVariation:
    """Squared distances of tokens from their mean, summed, without keeping tokens.

    Chan, Golub and LeVeque's merging of two sets' means and sums of squares, float64.

    Attributes:
        count: of tokens.
        mean: (H,) float64, on the CPU; None without a token.
        squares: sum over tokens and channels.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Optional[torch.Tensor] = None
        self.squares = 0.0

    def update(self, tokens: torch.Tensor) -> None:
        """Add tokens.

        Args:
            tokens: (T, H), of any type and device.
        """
        count = tokens.shape[0]
        if not count:
            return
        x = tokens.double()
        own = x.mean(0)
        self.squares += (x - own).square().sum().item()
        own = own.cpu()
        if self.mean is None:
            self.count, self.mean = count, own
            return
        total = self.count + count
        apart = own - self.mean
        self.squares += apart.square().sum().item() * self.count * count / total
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def energy(self) -> float:
        """Per token; zero without one."""
        return self.squares / max(self.count, 1)
