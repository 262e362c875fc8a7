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

from typing import Sequence

import torch

__all__ = ["SAMPLE_TOKENS", "TokenSample"]

#: Tokens of a modality that are kept to judge solutions by, at most.
SAMPLE_TOKENS = 256


class TokenSample:
    """Some of the rows that were shown, in their order.

    Attributes:
        rows: (S, ...), S at most ``SAMPLE_TOKENS``.
        numbers: (S,) int64 of the rows among all, ascending; on the CPU.
    """

    def __init__(self, rows: torch.Tensor, numbers: torch.Tensor):
        self.rows, self.numbers = rows, numbers

    @classmethod
    def empty(
        cls, *shape: int, dtype: torch.dtype, device: torch.device
    ) -> "TokenSample":
        """Of rows of a shape."""
        rows = torch.zeros(0, *shape, dtype=dtype, device=device)
        return cls(rows, torch.zeros(0, dtype=torch.int64))

    def add(self, rows: torch.Tensor, first: int) -> None:
        """Show more rows.

        Args:
            rows: (T, ...).
            first: number of the first of them; the others follow.
        """
        more = torch.arange(first, first + len(rows))
        numbers = torch.cat((self.numbers, more))
        stay = _least(numbers)
        old, new = stay[stay < len(self.numbers)], stay[stay >= len(self.numbers)]
        new = new - len(self.numbers)
        self.rows = torch.cat(
            (
                self.rows[old.to(self.rows.device)],
                rows[new.to(rows.device)].to(self.rows),
            )
        )
        self.numbers = numbers[stay]

    @classmethod
    def together(cls, parts: "Sequence[TokenSample]") -> "TokenSample":
        """That of all rows, from samples of neighbouring ones, in their order."""
        numbers = torch.cat([part.numbers for part in parts])
        stay = _least(numbers)
        return cls(torch.cat([part.rows for part in parts])[stay], numbers[stay])

    def to(self, device: "torch.device | str") -> "TokenSample":
        """The same, with rows on a device."""
        return TokenSample(self.rows.to(device), self.numbers)


def _least(numbers: torch.Tensor) -> torch.Tensor:
    """Places of the numbers that stay, ascending."""
    if len(numbers) <= SAMPLE_TOKENS:
        return torch.arange(len(numbers))
    return _mixed(numbers).argsort()[:SAMPLE_TOKENS].sort().values


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
