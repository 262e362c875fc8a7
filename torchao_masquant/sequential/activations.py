# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is kept of each sample between blocks: in memory, or in mapped files."""

import shutil
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from torchao_masquant.atomic_files import replacing
from torchao_masquant.decoder_blocks import is_cache

__all__ = ["ActivationStore", "kept", "tree_map"]


def tree_map(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The same nested containers with a function's results for tensors."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([tree_map(function, value) for value in tree])
    return tree


def kept(tree: Any) -> Any:
    """A call's arguments or a block's output as they are kept: on the CPU.

    Caches of keys and values are left out: a sample runs once, as a whole.

    Raises:
        TypeError: an argument that is neither data nor a cache.
    """
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu")
    if isinstance(tree, dict):
        return {key: kept(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [kept(value) for value in tree]
        return tuple(values) if isinstance(tree, tuple) else values
    if tree is None or isinstance(tree, (bool, int, float, str, torch.dtype)):
        return tree
    if is_cache("", tree):
        return None
    raise TypeError(
        f"the decoder is called with a {type(tree).__name__}, which cannot be kept "
        "between blocks: use calibrate() with the model in memory."
    )


class ActivationStore:
    """Nested containers of tensors by name.

    Args:
        folder: where each entry is a file, mapped when it is read, so that the system
            may drop its pages; None: all entries are held in memory. The folder is
            emptied first: its files are of no use to another run.
    """

    def __init__(self, folder: Optional[Path] = None):
        self._folder = folder
        self._held: dict[str, Any] = {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def put(self, name: str, tree: Any) -> None:
        """Keep an entry, in place of an older one of that name.

        Args:
            tree: as :func:`kept` gives it.
        """
        if self._folder is None:
            self._held[name] = tree
            return
        # A mapping of the old file, where there still is one, keeps its values.
        with replacing(self._folder / name) as temporary:
            torch.save(tree, temporary)

    def get(self, name: str) -> Any:
        """An entry, on the CPU; not to be written to."""
        if self._folder is None:
            return self._held[name]
        return torch.load(self._folder / name, mmap=True, weights_only=True)

    def close(self) -> None:
        """Forget all entries."""
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
