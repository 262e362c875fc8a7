# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What lies in a model's folder beside its weights, and goes along with new ones."""

import fnmatch
import logging
import os
import shutil
from pathlib import Path
from typing import Iterator, Sequence

from torchao_masquant.hub import OTHER_WEIGHTS

__all__ = ["copy_other_files"]

_LOGGER = logging.getLogger(__name__)

# Weights of transformers, which new ones take the place of.
_WEIGHTS = ("*.safetensors", "*.index.json")

_OLD_WEIGHTS = ("pytorch_model*.bin", "*.index.json")

# A part of a model that is loaded on top of it, under its own name.
_ADAPTERS = ("adapter_model*.safetensors", "adapter_model*.bin")

# The new folder has a card of its own.
_CARD = "README.md"


def copy_other_files(original: Path, new: Path) -> None:
    """Copy what is no weight: tokenizer, processor, templates, code, speakers' voices.

    Folders are copied whole, but for those that hold weights: they are other models, or
    the same one in another format. What is left out so is named in a warning. Hidden
    files and the original's README.md stay behind; what ``new`` has already stays as it
    is.

    Args:
        original: folder of a model, which may be one of links into a hub cache.
        new: folder with new weights.
    """
    left: list[str] = []
    for relative in _others(original, new, left):
        target = new / relative
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # What a link leads to.
        shutil.copy2(original / relative, target)
    if left:
        _LOGGER.warning(
            "not copied from %s, since it holds weights of another format, or leads "
            "nowhere: %s.",
            original,
            ", ".join(left),
        )


def _others(original: Path, new: Path, left: list[str]) -> Iterator[Path]:
    """Relative paths of what to copy; what is not is added to ``left``."""
    # Those that the model was loaded from need no mention.
    loaded = _WEIGHTS if any(original.glob("*.safetensors")) else _OLD_WEIGHTS
    for path in sorted(original.iterdir()):
        name = path.name
        if name.startswith(".") or name in (_CARD, "__pycache__"):
            continue
        if path.is_dir():
            if new.resolve().is_relative_to(path.resolve()):
                continue
            files = list(_files(path))
            if any(_holds_weights(file.name) for file in files):
                left.append(f"{name}/")
                continue
            yield from (file.relative_to(original) for file in files if file.is_file())
        elif _holds_weights(name):
            if not _matches(name, loaded) or name.startswith("consolidated"):
                left.append(name)
        elif path.is_file():
            yield path.relative_to(original)
        else:
            left.append(name)


def _files(folder: Path) -> Iterator[Path]:
    """Files under a folder, none of them hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f != "__pycache__"
        )
        yield from (Path(parent, n) for n in sorted(names) if not n.startswith("."))


def _holds_weights(name: str) -> bool:
    return not _matches(name, _ADAPTERS) and _matches(name, _WEIGHTS + OTHER_WEIGHTS)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
