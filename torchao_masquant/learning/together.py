# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The processes that learn one block together, each with some of the samples."""

from typing import Callable, Protocol, TypeVar

import torch

__all__ = ["Alone", "Together"]

_T = TypeVar("_T")


class Together(Protocol):
    """Processes with neighbouring samples, in the order of their ranks."""

    @property
    def rank(self) -> int:
        """Of this process."""

    def gather(self, value: _T) -> list[_T]:
        """What each process has, in order."""

    def in_turn(self, function: Callable[[_T], _T], value: _T) -> _T:
        """Hand a value on from process to process, each putting its own in its place.

        Returns:
            To all, what the last one made of it.
        """

    def add(self, tensor: torch.Tensor) -> None:
        """Put the sum over the processes in a tensor's place, the same bits in each."""


class Alone:
    """One process with all samples."""

    rank = 0

    def gather(self, value: _T) -> list[_T]:
        return [value]

    def in_turn(self, function: Callable[[_T], _T], value: _T) -> _T:
        return function(value)

    def add(self, tensor: torch.Tensor) -> None:
        pass
