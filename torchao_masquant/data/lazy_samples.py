# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Samples that are made when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, overload

__all__ = ["LazySamples"]


class LazySamples(Sequence[dict[str, Any]]):
    """A sequence of a model's keyword inputs, none of which is kept."""

    @abstractmethod
    def _sample(self, index: int) -> dict[str, Any]:
        """Make one."""

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "list[dict[str, Any]]": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._sample(i) for i in range(*index.indices(len(self)))]
        return self._sample(index)
