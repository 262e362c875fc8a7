# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized checkpoint written part by part, as ``save_pretrained`` writes it whole."""

import os
import shutil
from pathlib import Path
from typing import Any, Mapping, Sequence

import safetensors
import torch
from torch import nn

from torchao_masquant.atomic_files import sync
from torchao_masquant.hub import write_index
from torchao_masquant.integrations.checkpoint_format import (
    CheckpointFormat,
    flatten_state_dict,
    parameter_of,
)
from torchao_masquant.integrations.guard import guardable
from torchao_masquant.integrations.hf_config import MASQuantHfConfig
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.integrations.model_card import write_model_card
from torchao_masquant.integrations.other_files import copy_other_files
from torchao_masquant.integrations.unloaded import (
    PART_BYTES,
    parts_of_unloaded,
    tell_of_unloaded,
)
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import library_versions
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.disk_model import DiskModel
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["assemble", "other_parts", "write_part", "write_unloaded"]


def other_parts(disk: DiskModel, in_blocks: Sequence[str]) -> dict[str, list[str]]:
    """Weights outside of the blocks, in parts that fit in memory.

    Args:
        disk: the model.
        in_blocks: names of all weights of blocks.

    Returns:
        Name of a part to names of weights in the model; those that come out of the same
        stored tensors stay together.
    """
    taken = set(in_blocks)
    together: dict[str, list[str]] = {}
    for names in disk.names.values():
        if not taken & set(names):
            together[names[0]] = names
    parts: list[list[str]] = []
    used = PART_BYTES
    for names in together.values():
        needed = disk.bytes_of(names)
        if used + needed > PART_BYTES:
            parts.append([])
            used = 0
        parts[-1] += names
        used += needed
    return {f"other-{index:05d}": names for index, names in enumerate(parts)}


def write_part(
    disk: DiskModel,
    store: BlockStore,
    part: str,
    names: Sequence[str],
    quantized: Mapping[str, MASQuantTensor],
) -> None:
    """Write some of the model's weights, which are loaded, and mark the part finished.

    Args:
        part: its name.
        names: of the weights in the model.
        quantized: name of a linear, or of a parameter of experts, to the weight that
            takes its weight's place; in the order of the model.
    """
    state = disk.model.state_dict()
    unsaved = set(getattr(disk.model, "_keys_to_ignore_on_save", None) or ())
    tensors = {name: state[name].detach() for name in names if name not in unsaved}
    tensors |= {
        parameter_of(name, weight.shape): weight for name, weight in quantized.items()
    }
    store.finish(
        part,
        _apart(
            disk.in_files(flatten_state_dict(tensors, is_guarded=guardable(disk.model)))
        ),
        {name: LayerFormat.of(weight) for name, weight in quantized.items()},
    )


def write_unloaded(disk: DiskModel, store: BlockStore) -> list[str]:
    """Write the tensors that the model's class does not load, as they are.

    Returns:
        Names of the parts.
    """
    tell_of_unloaded(list(disk.unloaded), disk.model, disk.is_whole)
    parts: list[str] = []
    if disk.is_whole:
        for tensors in parts_of_unloaded(disk.unloaded):
            parts.append(f"unloaded-{len(parts):05d}")
            store.finish(parts[-1], tensors)
    return parts


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory, which safetensors refuses."""
    found: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def assemble(
    disk: DiskModel,
    store: BlockStore,
    parts: Sequence[str],
    options: SolverOptions,
    description: Mapping[str, Any],
    called: str,
    extra: Mapping[str, str],
) -> Path:
    """A folder that ``from_pretrained`` loads, from finished parts.

    The parts' files are linked, not copied, where the file system can.

    Args:
        parts: names of all of them.
        options: that all linears were solved with.
        description: of the calibration, see :class:`~torchao_masquant.Recipe`.
        called: what the folder will be.
        extra: name to text of other files to write.

    Returns:
        The folder, inside that of ``store``: to be renamed to where it belongs.
    """
    folder = store.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    weight_map: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _link(store.shard_of(part), folder / name)
        with safetensors.safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        size += (folder / name).stat().st_size
    write_index(folder, weight_map, size)
    model = disk.model
    formats = _in_order_of(model, store.formats(parts))
    known = {name: options for name in formats}
    checkpoint = CheckpointFormat.described(model.dtype, formats, known)
    checkpoint.description = {"versions": library_versions(), **description}
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = MASQuantHfConfig.of_checkpoint(checkpoint)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    copy_other_files(disk.folder, folder)
    write_model_card(folder, disk.folder, called)
    for name, text in extra.items():
        (folder / name).write_text(text)
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    return folder


def _in_order_of(
    model: nn.Module, formats: Mapping[str, LayerFormat]
) -> dict[str, LayerFormat]:
    """As a model in memory lists them: its head is behind the blocks."""
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}

    def place(name: str) -> int:
        return places[name] if name in places else places[name.rpartition(".")[0]]

    return {name: formats[name] for name in sorted(formats, key=place)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
