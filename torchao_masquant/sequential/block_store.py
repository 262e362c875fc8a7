# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Finished blocks of a calibration, durable one by one.

A block's files are written and synced under temporary names, and renamed; the one that
says that the block is finished comes last. A process that is killed at any moment
leaves a block finished or not begun.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import torch
from safetensors.torch import save_file

from torchao_masquant.atomic_files import replacing, sync, write_whole
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.recipe import LayerRecipe, Recipe
from torchao_masquant.sequential.manifest import read_json

__all__ = ["BlockStore"]


class BlockStore:
    """The folder of a calibration that runs, or was interrupted.

    Args:
        folder: made where missing; what a killed process left half-written is removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)

    def recipe_of(self, index: int) -> Path:
        """File of a block's part of the recipe."""
        return self.folder / f"{self.part_of(index)}.recipe.safetensors"

    def shard_of(self, part: str) -> Path:
        """File of a part of the quantized checkpoint."""
        return self.folder / f"{part}.weights.safetensors"

    @staticmethod
    def part_of(index: int) -> str:
        """What a block is called among the parts of the checkpoint."""
        return f"block-{index:05d}"

    def _marker(self, part: str) -> Path:
        return self.folder / f"{part}.json"

    def finished(self, part: str) -> Optional[dict[str, Any]]:
        """What was noted of a finished part; None where it is not finished."""
        return read_json(self._marker(part))

    def finish(
        self,
        part: str,
        tensors: Optional[Mapping[str, torch.Tensor]] = None,
        formats: Optional[Mapping[str, LayerFormat]] = None,
        note: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Write a part of the checkpoint, and that it is finished.

        Args:
            part: its name.
            tensors: of the checkpoint, under their names in files; None where no
                checkpoint is asked for.
            formats: of its quantized linears and experts.
            note: what else to remember of it.
        """
        if tensors is not None:
            with replacing(self.shard_of(part), durable=True) as temporary:
                save_file(dict(tensors), temporary, metadata={"format": "pt"})
        marker = {
            "formats": {n: f.to_json() for n, f in (formats or {}).items()},
            **(note or {}),
        }
        write_whole(self._marker(part), json.dumps(marker), durable=True)

    def forget(self, part: str) -> None:
        """Let a part count as not finished."""
        self._marker(part).unlink(missing_ok=True)

    def save_recipe(self, index: int, recipe: Recipe) -> None:
        """Write a block's part of the recipe; before :meth:`finish`."""
        with replacing(self.recipe_of(index), durable=True) as temporary:
            recipe.save(temporary)

    def layers(self, index: int) -> dict[str, LayerRecipe]:
        """What was solved for a finished block."""
        path = self.recipe_of(index)
        return Recipe.load(path).layers if path.is_file() else {}

    def formats(self, parts: Sequence[str]) -> dict[str, LayerFormat]:
        """Of all quantized linears and experts of some finished parts."""
        found: dict[str, LayerFormat] = {}
        for part in parts:
            marker = self.finished(part)
            assert marker is not None
            for name, entry in marker["formats"].items():
                found[name] = LayerFormat.from_json(entry)
        return found

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder)
        sync(self.folder.parent)
