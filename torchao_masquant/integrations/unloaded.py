# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tensors of a checkpoint that its class does not load, such as the head that predicts
further tokens: other programs use them, so they go along with new weights."""

import logging
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import safetensors
import torch
from safetensors.torch import save_file

from torchao_masquant.hub import read_config, weight_files, write_index
from torchao_masquant.integrations.stored_names import loaded_names

__all__ = [
    "PART_BYTES",
    "add_unloaded",
    "is_of_same_model",
    "parts_of_unloaded",
    "tell_of_unloaded",
    "unloaded_tensors",
]

_LOGGER = logging.getLogger(__name__)

#: Tensors that are in memory at a time take no more than this, or are one.
PART_BYTES = 1 << 30


def unloaded_tensors(model: Any, folder: Path) -> dict[str, Path]:
    """What a checkpoint holds beyond a model.

    A tensor that loading renames, splits or merges is in the model, under another name.

    Args:
        model: of transformers, dense or quantized.
        folder: of the checkpoint that it is made from.

    Returns:
        Name of each tensor to the file that holds it.
    """
    try:
        files = weight_files(folder, pickled=True)
    except FileNotFoundError:
        # A config alone, or weights in another format, which transformers converts.
        return {}
    stored = {name: file for file in files for name in _names_in(file)}
    loaded = loaded_names(model, list(stored))
    return {name: file for name, file in stored.items() if name not in loaded}


def is_of_same_model(model: Any, folder: Path) -> bool:
    """Whether a checkpoint is of this kind of model, and not of one around it."""
    config = read_config(folder)
    return config.get("model_type") in (None, model.config.model_type)


def tell_of_unloaded(names: Sequence[str], model: Any, kept: bool) -> None:
    """Say in one line what becomes of such tensors; nothing where there are none.

    Args:
        kept: whether they go along.
    """
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        _LOGGER.warning(
            "%s %d tensor%s of the original that %s does not load: %s.",
            "carried over as they are:" if kept else "left out, as of a larger model:",
            len(names),
            "" if len(names) == 1 else "s",
            type(model).__name__,
            shown,
        )


def parts_of_unloaded(
    tensors: Mapping[str, Path],
) -> Iterator[dict[str, torch.Tensor]]:
    """Read them, so many at a time as fit in memory.

    Args:
        tensors: as :func:`unloaded_tensors` gives them.

    Yields:
        Name to tensor, on the CPU, sharing memory with none.
    """
    part: dict[str, torch.Tensor] = {}
    size = 0
    for file in dict.fromkeys(tensors.values()):
        for name, tensor in _read(file, [n for n, f in tensors.items() if f == file]):
            if part and size + tensor.nbytes > PART_BYTES:
                yield part
                part, size = {}, 0
            part[name] = tensor
            size += tensor.nbytes
    if part:
        yield part


def add_unloaded(folder: Path, tensors: Mapping[str, Path]) -> None:
    """Write such tensors into a checkpoint that has just been saved.

    Its files are numbered anew, and its index names them all.

    Args:
        folder: that ``save_pretrained`` wrote.
        tensors: as :func:`unloaded_tensors` gives them.
    """
    if not tensors:
        return
    files = weight_files(folder, pickled=True)
    added: list[Path] = []
    for part in parts_of_unloaded(tensors):
        added.append(folder / f"unloaded-{len(added)}.safetensors")
        save_file(part, added[-1], {"format": "pt"})
    weight_map: dict[str, str] = {}
    size = 0
    count = len(files) + len(added)
    for number, file in enumerate([*files, *added], start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        names = _names_in(file)
        file.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
        size += (folder / name).stat().st_size
    write_index(folder, weight_map, size)


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return [n for n, t in _unpickled(file).items() if isinstance(t, torch.Tensor)]


def _read(file: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
        return
    state = _unpickled(file)
    for name in names:
        yield name, state[name].detach().clone(memory_format=torch.contiguous_format)


def _unpickled(file: Path) -> Mapping[str, Any]:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:
        # Files of torch before 1.6 cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True)
