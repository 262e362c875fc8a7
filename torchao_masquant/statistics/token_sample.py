# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A random sample of tokens that does not depend on who saw which of them.

Every token of a modality has a number, the order in which one process would see them, and
those whose numbers are mixed to the smallest values stay. Which they are follows from how
many tokens there are, and from nothing else: not from lengths of rows, nor from calls, nor
from how processes share them.
"""

from typing import Optional, Sequence

import torch

__all__ = ["SAMPLE_TOKENS", "TokenSample"]

#: Tokens of a modality that are kept to judge solutions by, at most.
SAMPLE_TOKENS = 256


class TokenSample:
    """Some of the rows that were shown, in their order.

    Attributes:
        rows: (S, ...), S at most ``SAMPLE_TOKENS``.
        numbers: (S,) int64 of the rows among all, ascending; on the CPU.
        weights: (S,) float64, by how much each is the likelier to be here; on the CPU.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        numbers: torch.Tensor,
        weights: Optional[torch.Tensor] = None,
    ):
        self.rows, self.numbers = rows, numbers
        self.weights = _ones(len(rows)) if weights is None else weights

    @classmethod
    def empty(
        cls, *shape: int, dtype: torch.dtype, device: torch.device
    ) -> "TokenSample":
        """Of rows of a shape."""
        rows = torch.zeros(0, *shape, dtype=dtype, device=device)
        return cls(rows, torch.zeros(0, dtype=torch.int64))

    def add(
        self, rows: torch.Tensor, first: int, weights: Optional[torch.Tensor] = None
    ) -> None:
        """Show more rows.

        Args:
            rows: (T, ...).
            first: number of the first of them; the others follow.
            weights: (T,) positive, of each; None: ones.
        """
        if weights is None:
            weights = _ones(len(rows))
        weights = torch.cat((self.weights, weights.to("cpu", torch.float64)))
        more = torch.arange(first, first + len(rows))
        numbers = torch.cat((self.numbers, more))
        stay = _least(numbers, weights)
        old, new = stay[stay < len(self.numbers)], stay[stay >= len(self.numbers)]
        new = new - len(self.numbers)
        self.rows = torch.cat(
            (
                self.rows[old.to(self.rows.device)],
                rows[new.to(rows.device)].to(self.rows),
            )
        )
        self.numbers, self.weights = numbers[stay], weights[stay]

    @classmethod
    def together(cls, parts: "Sequence[TokenSample]") -> "TokenSample":
        """That of all rows, from samples of neighbouring ones, in their order."""
        numbers = torch.cat([part.numbers for part in parts])
        weights = torch.cat([part.weights for part in parts])
        stay = _least(numbers, weights)
        rows = torch.cat([part.rows for part in parts])
        return cls(rows[stay], numbers[stay], weights[stay])

    def to(self, device: "torch.device | str") -> "TokenSample":
        """The same, with rows on a device."""
        return TokenSample(self.rows.to(device), self.numbers, self.weights)


def _ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64)


def _least(numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Places of the numbers that stay, ascending."""
    if len(numbers) <= SAMPLE_TOKENS:
        return torch.arange(len(numbers))
    keys = _mixed(numbers)
    if (weights != weights[0]).any():
        # Of independent clocks that ring at these rates, those that ring first: a sample
        # without replacement, each row drawn by its weight among those that are left.
        uniform = (keys.double() * 2.0**-64 + 0.5).clamp(2.0**-54, 1 - 2.0**-53)
        keys = -torch.log1p(-uniform) / weights
    return keys.argsort()[:SAMPLE_TOKENS].sort().values


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Different numbers to different ones that look random: splitmix64's finalizer."""
    # One step of the generator first, which leaves no number where it is.
    x = (numbers + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
