# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate_sequential``: quantize a model that does not fit in memory."""

import functools
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import safetensors
import torch
from torch import nn

from torchao_masquant.atomic_files import move_folder, replacing, sync
from torchao_masquant.calibration.observed_experts import as_observed
from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.decoder_blocks import decoder_blocks
from torchao_masquant.freed_memory import return_freed_memory
from torchao_masquant.model_parts import heads_of, token_reader
from torchao_masquant.option_fields import takes_options
from torchao_masquant.option_values import AUTO
from torchao_masquant.options import SolverOptions
from torchao_masquant.outputs import check_file, check_folder
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe, Recipe, join_recipes, library_versions
from torchao_masquant.routing import Router
from torchao_masquant.selection import select
from torchao_masquant.sequential.activations import ActivationStore, kept
from torchao_masquant.sequential.block_learner import BlockLearner
from torchao_masquant.sequential.block_solver import BlockLayers, BlockSolver
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.checkpoint_parts import (
    assemble,
    other_parts,
    write_part,
    write_unloaded,
)
from torchao_masquant.sequential.decoder_walk import DecoderCall, DecoderWalk
from torchao_masquant.sequential.disk_model import DiskModel
from torchao_masquant.sequential.manifest import (
    Manifest,
    SampleSummary,
    file_digests,
    read_json,
    summarize_samples,
)
from torchao_masquant.sequential.preflight import (
    available_memory,
    check_time,
    estimate,
)
from torchao_masquant.sequential.sequential_options import SequentialOptions
from torchao_masquant.sequential.team import Team
from torchao_masquant.threads import threads_for, widest

__all__ = ["SequentialResult", "calibrate_sequential"]

_LOGGER = logging.getLogger(__name__)

#: Of the file in a finished checkpoint that says what it was made from.
_ORIGIN = "masquant_calibration.json"


@dataclass(frozen=True)
class SequentialResult:
    """What :func:`calibrate_sequential` wrote.

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


@takes_options(SequentialOptions)
def calibrate_sequential(
    model: Union[str, os.PathLike],
    samples: Iterable[Mapping[str, Any]],
    given: SequentialOptions,
) -> SequentialResult:
    """Calibrate and quantize a model one block at a time, from disk to disk.

    Gives what ``calibrate`` gives, and what ``quantize_`` and ``save_pretrained`` make of
    it, for a model that is never in memory as a whole. Towers and embeddings are
    loaded to run the samples up to the decoder, and freed; then each block of the
    decoder is loaded, observed, solved for, quantized and written, and freed. What
    stays in memory is one block, its statistics, and the samples' activations between
    blocks (two hidden states a token), which ``activations="disk"`` maps from files.

    A finished block is durable. After an interruption, however hard, the same call goes
    on behind the last one: samples run through the finished blocks again, nothing is
    solved twice, and the result is that of an uninterrupted run, bit for bit (on the
    same machine, with as many threads). Until the end everything lies in a folder
    beside the result, its name with ``.partial`` added.

    Before hours are spent, peak memory, disk and time are estimated, and what will not
    fit is refused, with the option that would make it fit.

    Under ``torchrun``, after ``torch.distributed.init_process_group``, the processes
    share the samples and the solving; process 0 writes. The folders must be on a file
    system that all of them see.

    ``rank="auto"`` spends its bytes in each block by itself. Of method "masquant-paper"
    there is the closed form alone, ``epochs=0``.

    Args:
        model: folder of a transformers checkpoint in safetensors files, or its name on
            the hub.
        samples: as for ``calibrate``, on the CPU; run through more than once.
        {options}

    Returns:
        Where the results are.

    Raises:
        ValueError: as ``calibrate``; the decoder cannot be run block by block; memory,
            disk or time will not do; model, samples or options are not those that an
            interrupted run was begun with; ``output`` or ``recipe`` is there already,
            and of something else.
        TypeError: an option or a sample is of the wrong type; ``samples`` is an
            iterator.
        FileNotFoundError: there is no such model.
        TeamError: another process has died, or has learned something else.
    """
    options = given.options
    if options.learns_factors:
        raise ValueError(
            f"method {options.method!r} learns its smoothing factors in memory alone: "
            "use calibrate, or epochs=0 for factors in closed form."
        )
    outputs = _Outputs(given.output, given.recipe, given.overwrite)
    team = Team(given.timeout)
    if options.epochs and options.batch_size < team.size and team.rank == 0:
        _LOGGER.warning(
            "a step of learning has batch_size=%d samples for %d processes, and those "
            "without one wait: a multiple of %d keeps all busy (another result, of "
            "fewer steps).",
            options.batch_size,
            team.size,
            team.size,
        )
    team.on_first(lambda: outputs.check(Path(model)))
    disk = DiskModel(model, given.dtype, given.device, given.model_class)
    met = base_first(disk.model, given.base_modality, given.modalities)
    selected = select(disk.model, given.include, given.exclude, options, len(met))
    layers = BlockLayers(selected.linears, selected.experts)
    blocks = decoder_blocks(disk.model, layers.names)
    router = Router.for_model(disk.model, met)
    router.skip_padding = True
    check_request(disk.model, selected, router.modalities, options)
    summary = summarize_samples(samples)
    if len(set(team.gather(summary.digest))) > 1:
        raise ValueError(
            "the processes were given different samples: give all of them to each, in "
            "the same order; they share the work themselves."
        )
    if summary.count < team.size:
        raise ValueError(
            f"there are {summary.count} samples for {team.size} processes: start as many "
            "processes as there are samples, or fewer."
        )
    run = _Run(
        disk,
        layers,
        blocks,
        router,
        options,
        outputs,
        team,
        summary,
        given.max_statistics_bytes,
        {"samples": summary.count, **(given.description or {})},
        given.progress,
    )
    run.check_room(given.max_memory_bytes, given.activations == "disk")
    # As ``calibrate`` does: sums depend on the number of threads.
    with threads_for(widest(selected.weights.values())):
        return run(samples, given.activations, given.max_seconds)


class _Outputs:
    """Where results go, and whether they are there."""

    def __init__(
        self,
        output: Union[str, os.PathLike, None],
        recipe: Union[str, os.PathLike, None],
        overwrite: bool,
    ):
        self.overwrite = overwrite
        if output is None and recipe is None:
            raise ValueError(
                "name what to write: output=, a folder for the quantized checkpoint, or "
                "recipe=, a file."
            )
        # Where links lead: they stay.
        self.checkpoint, self.recipe = (
            None if path is None else Path(os.path.realpath(path))
            for path in (output, recipe)
        )
        main = self.checkpoint or self.recipe
        assert main is not None
        self.partial = main.with_name(f"{main.name}.partial")

    def check(self, original: Path) -> None:
        """Raise where a result could not be written in the end.

        Args:
            original: folder of the model, or its name on the hub.

        Raises:
            FileNotFoundError: the folder around it does not exist.
            ValueError: something else is there.
        """
        if self.checkpoint is not None:
            check_folder(self.checkpoint, sources=[original])
        if self.recipe is not None:
            check_file(self.recipe, "recipe", sources=[original])
        for path in (self.checkpoint, self.recipe):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise FileNotFoundError(
                    f"cannot write {str(path)!r}: there is no folder "
                    f"{str(path.parent)!r}."
                )
            if path.exists() and self._origin(path) is None and not self.overwrite:
                raise self._occupied(path)

    @staticmethod
    def _occupied(path: Path) -> ValueError:
        return ValueError(
            f"{str(path)!r} is there already, and not a result of this calibration: "
            "let it be overwritten, or give another name."
        )

    @staticmethod
    def _origin(path: Path) -> Optional[str]:
        """Digest of the manifest that a result was made by."""
        if path.is_dir():
            return (read_json(path / _ORIGIN) or {}).get("digest")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("calibration")
        except (OSError, safetensors.SafetensorError):
            return None

    def finished(self, digest: str) -> bool:
        """Whether all results of a calibration are there.

        Raises:
            ValueError: one is of another calibration.
        """
        paths = [p for p in (self.checkpoint, self.recipe) if p is not None]
        there = [path for path in paths if path.exists()]
        ours = [path for path in there if self._origin(path) == digest]
        for path in there:
            if path not in ours and not self.overwrite:
                raise self._occupied(path)
        return len(ours) == len(paths)

    def is_written(self, digest: str) -> bool:
        """Whether the checkpoint of a calibration is there, or none is asked for."""
        path = self.checkpoint
        return path is None or (path.exists() and self._origin(path) == digest)


class _Run:
    """One call of :func:`calibrate_sequential`."""

    def __init__(
        self,
        disk: DiskModel,
        layers: BlockLayers,
        blocks: dict[str, nn.Module],
        router: Router,
        options: SolverOptions,
        outputs: _Outputs,
        team: Team,
        summary: SampleSummary,
        max_statistics_bytes: int,
        description: Mapping[str, Any],
        progress: bool,
    ):
        self.description = dict(description)
        self.disk, self.layers, self.router = disk, layers, router
        self.options, self.outputs, self.team = options, outputs, team
        self.summary, self.progress = summary, progress
        self.max_statistics_bytes = max_statistics_bytes
        self.walk = DecoderWalk(disk.model, blocks, router, disk.device)
        self.names = [disk.names_under(name) for name in blocks]
        self.mine = team.share_of(summary.count)
        self.estimated_bytes = 0

    def check_room(self, memory: Optional[int], on_disk: bool) -> None:
        """Raise where memory or disk will not do."""
        disk, device = self.disk, self.disk.device
        blocks = {name for names in self.names for name in names}
        others = [name for name in disk.names_in_files if name not in blocks]
        needs = estimate(
            blocks=[self._layers(index).shapes() for index in range(len(self.names))],
            block_bytes=[disk.bytes_of(names) for names in self.names],
            conversion_bytes=max(map(disk.bytes_of_conversion, self.names)),
            front_bytes=disk.bytes_of(self._front()),
            other_bytes=disk.bytes_of(others) + disk.unloaded_bytes,
            hidden=disk.model.config.get_text_config().hidden_size,
            itemsize=disk.dtype.itemsize,
            tokens=[self.summary.tokens[index] or 0 for index in self.mine],
            modalities=len(self.router.modalities),
            options=self.options,
            max_statistics_bytes=self.max_statistics_bytes,
            on_disk=on_disk,
            writes=(
                self.outputs.checkpoint is not None,
                self.outputs.recipe is not None,
            ),
        )
        if memory is None:
            free = available_memory()
            memory = None if free is None else free // self.team.local_size
        free_there = None
        if device.type == "cuda":
            free_there = torch.cuda.mem_get_info(device)[0]
        partial = self.outputs.partial
        written = sum(f.stat().st_size for f in partial.glob("*") if f.is_file())
        needs.check(memory, free_there, partial.parent, written)
        self.estimated_bytes = needs.peak

    def _layers(self, index: int) -> BlockLayers:
        """Those of one block."""
        prefix = f"{self.walk.names[index]}."
        return self.layers.where(lambda name: name.startswith(prefix))

    def __call__(
        self,
        samples: Iterable[Mapping[str, Any]],
        activations: str,
        max_seconds: Optional[float],
    ) -> SequentialResult:
        self.store, manifest, done = self.team.on_first(self._begin)
        blocks = len(self.walk.blocks)
        if done:
            return self._result(blocks, ())
        finished = self.team.on_first(
            lambda: [
                bool(self.store.finished(self.store.part_of(i))) for i in range(blocks)
            ]
        )
        seconds: list[float] = []
        if not all(finished):
            folder = self.store.folder / f"activations-{self.team.rank}"
            kept_activations = ActivationStore(
                folder if activations == "disk" else None
            )
            try:
                seconds = self._blocks(samples, kept_activations, finished, max_seconds)
            finally:
                kept_activations.close()
        self.team.on_first(lambda: self._finish(manifest.digest))
        return self._result(sum(finished), tuple(seconds))

    def _result(self, resumed: int, seconds: tuple[float, ...]) -> SequentialResult:
        return SequentialResult(
            self.outputs.checkpoint,
            self.outputs.recipe,
            len(self.walk.blocks),
            resumed,
            seconds,
            self.estimated_bytes,
        )

    def _begin(self) -> tuple[BlockStore, Manifest, bool]:
        """Compare with an interrupted run; whether nothing is left to do."""
        store = BlockStore(self.outputs.partial)
        folder = self.disk.folder
        config = (folder / "config.json").read_bytes()
        options = {f"option {k}": v for k, v in self.options.stored().items()}
        if self.options.rank == AUTO:
            # Bytes are spent among the linears of one pass.
            options["option max_statistics_bytes"] = self.max_statistics_bytes
        manifest = Manifest(
            store.folder / "manifest.json",
            {
                "model": [
                    config.decode(),
                    file_digests(self.disk.files, store.folder / "digests.json"),
                    type(self.disk.model).__name__,
                ],
                "set of samples": self.summary.digest,
                **options,
                "choice of modalities": self.router.modalities,
                "choice of linears": self.layers.names,
                "dtype": str(self.disk.dtype),
                "kind of device": self.disk.device.type,
                "number of processes": self.team.size,
                "version of a library": library_versions(),
                "output": self.outputs.checkpoint is not None,
                "recipe": self.outputs.recipe is not None,
            },
        )
        if not store.finished(store.part_of(0)):
            # Nothing is lost with what it was begun with.
            manifest.path.unlink(missing_ok=True)
            store.forget("proof")
        manifest.begin()
        done = self.outputs.finished(manifest.digest)
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
        before = self._capture(samples, activations)
        self._check_time(activations, finished, max_seconds)
        solver = BlockSolver(
            self.router, self.options, self.max_statistics_bytes, self.team, before
        )
        seconds = []
        last = max(i for i, done in enumerate(finished) if not done)
        learner = None
        if self.options.epochs:
            learner = BlockLearner(
                self.walk, activations, self.mine, self.options, self.team
            )
        bar = progress_bar(
            range(last + 1),
            desc="Blocks",
            show=self.progress and self.team.rank == 0,
        )
        for index in bar:
            start = time.perf_counter()
            self.team.barrier()
            with self.disk.loaded(self.names[index]):
                if finished[index]:
                    self._advance(index, activations)
                    if learner is not None:
                        learner.learn(index, self.store.layers(index), done=True)
                else:
                    self._calibrate(index, activations, solver, learner)
                    seconds.append(time.perf_counter() - start)
            return_freed_memory()
        if self.team.rank == 0:
            solver.notices.tell()
        return seconds

    def _check_time(
        self,
        activations: ActivationStore,
        finished: Sequence[bool],
        limit: Optional[float],
    ) -> None:
        """Measure, and raise where it would take too long."""
        first = self._runs(0, activations, replace=False)
        with self.disk.loaded(self.names[0]):
            start = time.perf_counter()
            next(first)
            if self.disk.device.type == "cuda":
                torch.cuda.synchronize(self.disk.device)
            passed = time.perf_counter() - start
        done = self.summary.tokens[self.mine[0]] or 1
        mine = sum(self.summary.tokens[index] or 1 for index in self.mine)

        def check() -> None:
            check_time(
                [
                    self._layers(i).shapes()
                    for i, there in enumerate(finished)
                    if not there
                ],
                len(self.router.modalities),
                self.options,
                forward=passed * mine / done,
                device=self.disk.device,
                processes=self.team.size,
                limit=limit,
            )

        self.team.on_first(check)

    # In front of the decoder

    def _front(self) -> list[str]:
        """Names of the weights that samples need on their way to the decoder."""
        model = self.disk.model
        reader = token_reader(model)
        blocks = {name for names in self.names for name in names}
        # Of a decoder that is a whole model, the head runs.
        idle = () if self.walk.decoder is reader else heads_of(reader)
        read = {id(m) for m in reader.modules()} - {id(head) for head in idle}
        return [
            name
            for name in self.disk.names_in_files
            if name not in blocks
            and id(model.get_submodule(name.rpartition(".")[0])) in read
        ]

    def _capture(
        self, samples: Iterable[Mapping[str, Any]], activations: ActivationStore
    ) -> list[int]:
        """Run this process's samples up to the decoder; prove that it can be walked.

        Returns:
            Tokens of each modality in the samples of the processes before this one.
        """
        disk, walk = self.disk, self.walk
        front = self._front()
        counts = [0] * len(self.router.modalities)
        with disk.loaded(front):
            bar = progress_bar(
                self._own(samples),
                desc="Embedding",
                total=len(self.mine),
                show=self.progress and self.team.rank == 0,
            )
            for index, sample in bar:
                call = walk.capture(sample)
                self._count(index, call, counts)
                activations.put(f"call-{index}", vars(call))
        own = [name for name in front if self._of_decoder(name)]
        proof = self.team.on_first(lambda: self.store.finished("proof"))
        if proof is None:
            with disk.loaded(own), walk.watching() as used:
                for index in self.summary.kinds.values():
                    if index in self.mine:
                        walk.prove(
                            self._call(activations, index),
                            lambda block: disk.loaded(self.names[block]),
                        )
            modules = sorted({name for part in self.team.gather(used) for name in part})
            proof = {"modules": modules}
            self.team.on_first(lambda: self.store.finish("proof", note=proof))
        disk.load(n for n in own if self._is_used(n, set(proof["modules"])))
        gathered = self.team.gather(counts)
        tokens = dict(zip(self.router.modalities, map(sum, zip(*gathered))))
        self.team.on_first(lambda: self.store.finish("tokens", note={"tokens": tokens}))
        before = gathered[: self.team.rank]
        return [sum(column) for column in zip(*before)] or [0] * len(counts)

    def _own(
        self, samples: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """This process's samples, with their numbers."""
        if isinstance(samples, Sequence):
            # Those of others are not made.
            yield from ((index, samples[index]) for index in self.mine)
            return
        for index, sample in enumerate(samples):
            if index in self.mine:
                yield index, sample

    @functools.cached_property
    def _decoder_name(self) -> str:
        modules = self.disk.model.named_modules()
        return next(name for name, module in modules if module is self.walk.decoder)

    def _of_decoder(self, name: str) -> bool:
        return not self._decoder_name or name.startswith(f"{self._decoder_name}.")

    def _is_used(self, name: str, used: set[str]) -> bool:
        """Whether one of the decoder's own weights is needed around the blocks."""
        module = name.rpartition(".")[0]
        parent = module.rpartition(".")[0]
        # Some modules take the weights of their children without calling them.
        return module in used or (parent in used and parent != self._decoder_name)

    def _count(self, index: int, call: DecoderCall, counts: list[int]) -> None:
        if call.ids is None:
            counts[0] += self.summary.tokens[index] or 0
        else:
            for modality in range(len(counts)):
                counts[modality] += int((call.ids == modality).sum())

    @staticmethod
    def _call(activations: ActivationStore, index: int) -> DecoderCall:
        return DecoderCall(**activations.get(f"call-{index}"))

    # The blocks

    def _runs(
        self, index: int, activations: ActivationStore, *, replace: bool
    ) -> Iterator[None]:
        """Run a block on each sample of this process in turn.

        Args:
            index: of the block.
            activations: outputs of the block before it.
            replace: put the block's own outputs in their place.
        """
        for number in self.mine:
            call = self._call(activations, number)
            previous = activations.get(f"hidden-{number}") if index else None
            block_call = self.walk.block_call(index, call, previous)
            output = self.walk.run_block(index, call, block_call)
            if replace:
                activations.put(f"hidden-{number}", kept(output))
            yield

    def _advance(self, index: int, activations: ActivationStore) -> None:
        # Bit for bit what the block gave when it was calibrated.
        with as_observed(self._layers(index).experts, self.router):
            for _ in self._runs(index, activations, replace=True):
                pass

    def _calibrate(
        self,
        index: int,
        activations: ActivationStore,
        solver: BlockSolver,
        learner: Optional[BlockLearner],
    ) -> None:
        chosen = self._layers(index)
        layers: dict[str, LayerRecipe] = {}
        if not chosen.names:
            self._advance(index, activations)
        else:
            first = self._runs(index, activations, replace=False)
            passes = solver.passes(chosen, functools.partial(next, first))
            for number, names in enumerate(passes, start=1):
                # Experts, where there are any, are observed in the last one.
                runs = self._runs(index, activations, replace=number == len(passes))
                layers |= solver.solve(chosen.where(names.__contains__), runs)
        if learner is not None:
            layers = learner.learn(index, layers, done=False)
        self.team.on_first(lambda: self._write(index, chosen, layers))

    def _write(
        self,
        index: int,
        chosen: BlockLayers,
        layers: Mapping[str, LayerRecipe],
    ) -> None:
        part = self.store.part_of(index)
        # The quantized stream of a run that goes on is made from it.
        if self.outputs.recipe is not None or self.options.epochs:
            found = Recipe(
                self.options,
                self.router.modalities,
                {name: layers[name] for name in chosen.names if name in layers},
                library_versions(),
            )
            self.store.save_recipe(index, found)
        if self.outputs.checkpoint is None:
            self.store.finish(part)
            return
        places = {name: i for i, name in enumerate(self.disk.model.state_dict())}
        parameters = chosen.parameters()
        quantized = {
            name: layers[name].quantize(
                parameters[name][1],
                self.options.number_format,
                self.router.modalities,
                self.options.low_rank_bits,
            )
            for name in sorted(parameters, key=lambda n: places[parameters[n][0]])
            if name in layers
        }
        write_part(self.disk, self.store, part, self.names[index], quantized)

    # Behind the blocks

    def _finish(self, digest: str) -> None:
        """Write what is no block's, and give the results their names."""
        seen = self.store.finished("tokens") or {}
        if "tokens" in seen:
            self.description["tokens"] = seen["tokens"]
        store, parts = (
            self.store,
            [self.store.part_of(index) for index in range(len(self.walk.blocks))],
        )
        if self.outputs.recipe is not None:
            files = [store.recipe_of(index) for index in range(len(parts))]
            with replacing(self.outputs.recipe, durable=True) as temporary:
                join_recipes(
                    files, temporary, {"calibration": digest}, self.description
                )
        target = self.outputs.checkpoint
        if target is not None and not self.outputs.is_written(digest):
            in_blocks = [name for names in self.names for name in names]
            others = other_parts(self.disk, in_blocks)
            for part, names in others.items():
                if not store.finished(part):
                    with self.disk.loaded(names):
                        write_part(self.disk, store, part, names, {})
            unloaded = write_unloaded(self.disk, store)
            folder = assemble(
                self.disk,
                store,
                [*others, *parts, *unloaded],
                self.options,
                self.description,
                target.name,
                {_ORIGIN: json.dumps({"digest": digest})},
            )
            move_folder(folder, target, store.folder / "replaced")
            sync(target.parent)
        store.remove()
