# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model's keyword inputs in files of torch.save."""

import os
from pathlib import Path
from typing import Any, Union

import torch

from torchao_masquant.data.lazy_samples import LazySamples

__all__ = ["SavedSamples"]

_SUFFIX = ".pt"


class SavedSamples(LazySamples):
    """Samples that ``torch.save`` wrote, mapped from their files.

    Args:
        path: of a file that holds a list of dicts of the model's keyword inputs, or of a
            folder whose ``*.pt`` files hold one such dict each, taken in the order of
            their names. Nothing but tensors, numbers and strings is unpickled.

    Raises:
        FileNotFoundError: there is no such file or folder, or no file in it.
        ValueError: the file holds something else.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"there are no samples {os.fspath(path)!r}.")
        if self.path.is_dir():
            self._entries: list[Any] = sorted(self.path.glob(f"*{_SUFFIX}"))
            if not self._entries:
                raise FileNotFoundError(
                    f"there is no *{_SUFFIX} file in {os.fspath(path)!r}."
                )
            return
        self._entries = _load(self.path)
        if not isinstance(self._entries, list):
            raise ValueError(
                f"{self.path.name!r} holds a {type(self._entries).__name__}, not a list "
                "of dicts of the model's keyword inputs."
            )

    @classmethod
    def can_read(cls, path: Path) -> bool:
        """Whether these are such samples, by the names of the files."""
        if path.is_dir():
            return any(path.glob(f"*{_SUFFIX}"))
        return path.suffix == _SUFFIX

    def __len__(self) -> int:
        return len(self._entries)

    def _sample(self, index: int) -> dict[str, Any]:
        entry = self._entries[index]
        return _load(entry) if isinstance(entry, Path) else entry


def _load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, mmap=True)
    # Of pickle, zip and torch itself, for whatever is no such file.
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path.name!r} is not what torch.save writes of tensors, numbers and "
            f"strings ({reason})."
        ) from error
