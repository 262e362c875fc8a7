# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Writing what was found: a part for each block, and the results in the end."""

import json
from typing import Mapping, Sequence

import torch

from torchao_masquant.atomic_files import move_folder, replacing, sync
from torchao_masquant.models.output_head import stands_alone
from torchao_masquant.recipe import LayerRecipe, Recipe, join_recipes, library_versions
from torchao_masquant.selection import Selected
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.checkpoint_parts import (
    assemble,
    other_parts,
    write_part,
    write_unloaded,
)
from torchao_masquant.sequential.job import Job
from torchao_masquant.sequential.outputs import ORIGIN
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["Writer"]


def _parameters(selected: Selected) -> dict[str, tuple[str, torch.Tensor]]:
    """By name, what its parameter is called, and the weight, as it is quantized."""
    linears = {n: (f"{n}.weight", m.weight.data) for n, m in selected.linears.items()}
    return linears | {n: (n, w.weight) for n, w in selected.experts.items()}


class Writer:
    """What process 0 puts on disk.

    Args:
        job: whose results they are.
        store: of the finished parts.
    """

    def __init__(self, job: Job, store: BlockStore):
        self.job, self.store = job, store

    def write(self, index: int, layers: Mapping[str, LayerRecipe]) -> None:
        """What was found for a block, whose weights are loaded."""
        job = self.job
        chosen = job.selected_of(index)
        part = self.store.part_of(index)
        # The quantized stream of a run that goes on is made from it.
        in_both_streams = job.options.epochs or job.options.asymmetric_calibration
        if job.outputs.recipe is not None or in_both_streams:
            found = Recipe(
                job.options,
                job.router.modalities,
                {
                    **{name: layers[name] for name in chosen.layers if name in layers},
                    **(job.heads if index == len(job.names) - 1 else {}),
                },
                library_versions(),
            )
            self.store.save_recipe(index, found)
        if job.outputs.checkpoint is None:
            self.store.finish(part)
            return
        places = {name: i for i, name in enumerate(job.disk.model.state_dict())}
        parameters = _parameters(chosen)
        quantized = {
            name: layers[name].quantize(
                parameters[name][1],
                job.options.number_format,
                job.router.modalities,
                job.options.low_rank_bits,
            )
            for name in sorted(parameters, key=lambda n: places[parameters[n][0]])
            if name in layers
        }
        write_part(job.disk, self.store, part, job.names[index], quantized)

    def finish(self, digest: str) -> None:
        """Write what is no block's, and give the results their names.

        Args:
            digest: of the manifest.
        """
        job = self.job
        seen = self.store.finished("tokens") or {}
        if "tokens" in seen:
            job.description["tokens"] = seen["tokens"]
        store = self.store
        parts = [store.part_of(index) for index in range(len(job.walk.blocks))]
        if job.outputs.recipe is not None:
            files = [store.recipe_of(index) for index in range(len(parts))]
            with replacing(job.outputs.recipe, durable=True) as temporary:
                join_recipes(files, temporary, {"calibration": digest}, job.description)
        target = job.outputs.checkpoint
        if target is not None and not job.outputs.is_written(digest):
            others = other_parts(
                job.disk, [name for names in job.names for name in names]
            )
            for part, names in others.items():
                if not store.finished(part):
                    with job.disk.loaded(names):
                        write_part(job.disk, store, part, names, self._heads(names))
            for name in job.heads:
                stands_alone(job.disk.model, name)
            unloaded = write_unloaded(job.disk, store)
            folder = assemble(
                job.disk,
                store,
                [*others, *parts, *unloaded],
                job.options,
                job.description,
                target.name,
                {ORIGIN: json.dumps({"digest": digest})},
            )
            move_folder(folder, target, store.folder / "replaced")
            sync(target.parent)
        store.remove()

    def _heads(self, names: Sequence[str]) -> dict[str, MASQuantTensor]:
        """The output head, where it is quantized and its weight is among these.

        Args:
            names: of weights that are loaded; the head's may be that of embeddings.
        """
        job = self.job
        state = job.disk.model.state_dict()
        found = {}
        for name, layer in job.heads.items():
            weight = f"{name}.weight"
            if weight in names or job.disk.tied.get(weight) in names:
                found[name] = layer.quantize(
                    state[weight], job.options.number_format, job.router.modalities
                )
        return found
