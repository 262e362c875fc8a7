# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate_sequential``: quantize a model that does not fit in memory."""

import logging
import os
from pathlib import Path
from typing import Any, Iterable, Mapping, Union

from torchao_masquant.budget import check_budget
from torchao_masquant.calibration.request import base_first, check_request
from torchao_masquant.conductor.team import Team
from torchao_masquant.decoder_blocks import decoder_blocks
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.option_fields import takes_options
from torchao_masquant.routing import Router
from torchao_masquant.selection import select
from torchao_masquant.sequential.decoder_walk import DecoderWalk
from torchao_masquant.sequential.disk_model import DiskModel
from torchao_masquant.sequential.job import Job
from torchao_masquant.sequential.manifest import summarize_samples
from torchao_masquant.sequential.outputs import Outputs
from torchao_masquant.sequential.run import Run, SequentialResult
from torchao_masquant.sequential.sequential_options import SequentialOptions
from torchao_masquant.threads import threads_for, widest

__all__ = ["calibrate_sequential"]

_LOGGER = logging.getLogger(__name__)


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

    ``rank="auto"`` and a budget spend their bytes in each block by itself. Of method
    "masquant-paper" there is the closed form alone, ``epochs=0``.

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
    if options.procedure.folded:
        raise ValueError(
            f"target {options.target!r} is solved for in memory alone, where the whole "
            "model tells what its factors can be folded into: use calibrate."
        )
    outputs = Outputs(given.output, given.recipe, given.overwrite)
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
    if options.asymmetric_calibration and team.size > 1:
        raise ValueError(
            f"asymmetric calibration is for one process, and there are {team.size}: start "
            "one, or calibrate with asymmetric_calibration=False."
        )
    team.on_first(lambda: outputs.check(Path(model)))
    disk = DiskModel(model, given.dtype, given.device, given.model_class)
    met = base_first(disk.model, given.base_modality, given.modalities)
    selected = select(disk.model, given.include, given.exclude, options, len(met))
    if selected.towers:
        raise ValueError(
            f"{next(iter(selected.towers))} is of a tower, and calibrating from disk goes "
            "through the decoder alone: leave it out, or calibrate it in memory."
        )
    blocks = decoder_blocks(disk.model, list(selected.layers))
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
    job = Job(
        disk,
        selected,
        head_layers(disk.model, options, router.modalities, given.exclude),
        DecoderWalk(disk.model, blocks, router, disk.device),
        router,
        options,
        given.max_statistics_bytes,
        outputs,
        team,
        summary,
        {"samples": summary.count, **(given.description or {})},
        given.progress,
    )
    if options.budget:
        for index, name in enumerate(job.walk.names):
            of_block = job.selected_of(index)
            check_budget(
                of_block.widths, len(router.modalities), options, part=f" of {name}"
            )
    run = Run(job)
    run.check_room(given.max_memory_bytes, given.activations == "disk")
    # As ``calibrate`` does: sums depend on the number of threads.
    with threads_for(widest(selected.weights.values())):
        return run(samples, given.activations, given.max_seconds)
