# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The way through the blocks of a model on disk, from the last finished one on."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch

from torchao_masquant.freed_memory import return_freed_memory
from torchao_masquant.option_values import AUTO
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import library_versions
from torchao_masquant.sequential.activations import ActivationStore
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.blocks import Blocks
from torchao_masquant.sequential.front import Front
from torchao_masquant.sequential.job import Job
from torchao_masquant.sequential.manifest import Manifest, file_digests
from torchao_masquant.sequential.preflight import (
    available_memory,
    estimate,
)
from torchao_masquant.sequential.writer import Writer

__all__ = ["Run", "SequentialResult"]


@dataclass(frozen=True)
class SequentialResult:
    """What :func:`~torchao_masquant.sequential.calibrate_sequential` wrote.

    Attributes:
        checkpoint: folder that ``from_pretrained`` loads, None where none was asked for.
        recipe: file that ``Recipe.load`` reads, None where none was asked for.
        blocks: of the decoder.
        resumed: how many of them an interrupted run had finished.
        seconds: that each of the others took.
        estimated_bytes: of the peak memory of this process where blocks run on the CPU,
            as it was estimated before; an upper bound.
    """

    checkpoint: Optional[Path]
    recipe: Optional[Path]
    blocks: int
    resumed: int
    seconds: tuple[float, ...]
    estimated_bytes: int


class Run:
    """A calibration from disk.

    Args:
        job: what is calibrated.
    """

    def __init__(self, job: Job):
        self.job, self.front = job, Front(job)
        self.estimated_bytes = 0

    def check_room(self, memory: Optional[int], on_disk: bool) -> None:
        """Raise where memory or disk will not do."""
        job, disk, device = self.job, self.job.disk, self.job.disk.device
        blocks = job.in_blocks
        others = [name for name in disk.names_in_files if name not in blocks]
        needs = estimate(
            blocks=[job.selected_of(index).shapes for index in range(len(job.names))],
            block_bytes=[disk.bytes_of(names) for names in job.names],
            conversion_bytes=max(map(disk.bytes_of_conversion, job.names)),
            front_bytes=disk.bytes_of(self.front.names),
            other_bytes=disk.bytes_of(others)
            + disk.unloaded_bytes
            # Beside the embeddings, whose weight it may have had.
            + sum(math.prod(layer.shape) for layer in job.heads.values()),
            hidden=disk.model.config.get_text_config().hidden_size,
            itemsize=disk.dtype.itemsize,
            tokens=[job.summary.tokens[index] or 0 for index in job.mine],
            modalities=len(job.router.modalities),
            options=job.options,
            max_statistics_bytes=job.max_statistics_bytes,
            on_disk=on_disk,
            writes=(
                job.outputs.checkpoint is not None,
                job.outputs.recipe is not None,
            ),
        )
        if memory is None:
            free = available_memory()
            memory = None if free is None else free // job.team.local_size
        free_there = None
        if device.type == "cuda":
            free_there = torch.cuda.mem_get_info(device)[0]
        partial = job.outputs.partial
        written = sum(f.stat().st_size for f in partial.glob("*") if f.is_file())
        needs.check(memory, free_there, partial.parent, written)
        self.estimated_bytes = needs.peak

    def __call__(
        self,
        samples: Iterable[Mapping[str, Any]],
        activations: str,
        max_seconds: Optional[float],
    ) -> SequentialResult:
        job = self.job
        self.store, manifest, done = job.team.on_first(self._begin)
        blocks = len(job.walk.blocks)
        if done:
            return self._result(blocks, ())
        finished = job.team.on_first(
            lambda: [
                bool(self.store.finished(self.store.part_of(i))) for i in range(blocks)
            ]
        )
        seconds: list[float] = []
        if not all(finished):
            folder = self.store.folder / f"activations-{job.team.rank}"
            kept_activations = ActivationStore(
                folder if activations == "disk" else None
            )
            try:
                seconds = self._blocks(samples, kept_activations, finished, max_seconds)
            finally:
                kept_activations.close()
        job.team.on_first(lambda: Writer(job, self.store).finish(manifest.digest))
        return self._result(sum(finished), tuple(seconds))

    def _result(self, resumed: int, seconds: tuple[float, ...]) -> SequentialResult:
        return SequentialResult(
            self.job.outputs.checkpoint,
            self.job.outputs.recipe,
            len(self.job.walk.blocks),
            resumed,
            seconds,
            self.estimated_bytes,
        )

    def _begin(self) -> tuple[BlockStore, Manifest, bool]:
        """Compare with an interrupted run; whether nothing is left to do."""
        job = self.job
        store = BlockStore(job.outputs.partial)
        folder = job.disk.folder
        config = (folder / "config.json").read_bytes()
        options = {f"option {k}": v for k, v in job.options.stored().items()}
        if job.options.rank == AUTO or job.options.budget:
            # Bytes are spent among the linears of one pass.
            options["option max_statistics_bytes"] = job.max_statistics_bytes
        manifest = Manifest(
            store.folder / "manifest.json",
            {
                "model": [
                    config.decode(),
                    file_digests(job.disk.files, store.folder / "digests.json"),
                    type(job.disk.model).__name__,
                ],
                "set of samples": job.summary.digest,
                **options,
                "choice of modalities": job.router.modalities,
                "choice of linears": list(job.selected.layers),
                "dtype": str(job.disk.dtype),
                "kind of device": job.disk.device.type,
                "number of processes": job.team.size,
                "version of a library": library_versions(),
                "output": job.outputs.checkpoint is not None,
                "recipe": job.outputs.recipe is not None,
                **({"output head": list(job.heads)} if job.heads else {}),
            },
        )
        if not store.finished(store.part_of(0)):
            # Nothing is lost with what it was begun with.
            manifest.path.unlink(missing_ok=True)
            store.forget("proof")
        manifest.begin()
        done = job.outputs.finished(manifest.digest)
        if done:
            store.remove()
        return store, manifest, done

    def _blocks(
        self,
        samples: Iterable[Mapping[str, Any]],
        activations: ActivationStore,
        finished: Sequence[bool],
        max_seconds: Optional[float],
    ) -> list[float]:
        job = self.job
        before = self.front.capture(samples, activations, self.store)
        blocks = Blocks(job, activations, Writer(job, self.store), before)
        blocks.check_time(finished, max_seconds)
        seconds = []
        last = max(i for i, done in enumerate(finished) if not done)
        for index in progress_bar(range(last + 1), desc="Blocks", show=job.shows_bars):
            start = time.perf_counter()
            job.team.barrier()
            with job.disk.loaded(job.names[index]):
                if finished[index]:
                    blocks.pass_by(index, self.store)
                else:
                    blocks.calibrate(index)
                    seconds.append(time.perf_counter() - start)
            return_freed_memory()
        blocks.tell()
        return seconds
