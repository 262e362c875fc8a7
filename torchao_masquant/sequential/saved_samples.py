# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Samples in files, read one at a time."""

import os
from pathlib import Path
from typing import Any, Iterator, Union

import torch

__all__ = ["SavedSamples"]


class SavedSamples:
    """Samples that ``torch.save`` wrote: a list of them in one file, or a file for each.

    Args:
        path: of a file that holds a list of dicts of the model's keyword inputs, or of a
            folder whose ``*.pt`` files hold one such dict each, taken in the order of
            their names. Nothing but tensors, numbers and strings is unpickled.

    Raises:
        FileNotFoundError: there is no such file or folder, or no file in it.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"there are no samples {os.fspath(path)!r}.")
        if self.path.is_dir() and not self._files():
            raise FileNotFoundError(f"there is no *.pt file in {os.fspath(path)!r}.")

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.pt"))

    def __iter__(self) -> Iterator[Any]:
        if self.path.is_dir():
            yield from map(_load, self._files())
        else:
            yield from _load(self.path)


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True, mmap=True)
