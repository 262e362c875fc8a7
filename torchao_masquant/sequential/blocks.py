# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The blocks of a decoder: each is observed, solved for, learned and written."""

import functools
import time
from typing import Iterator, Optional, Sequence

import torch

from torchao_masquant.calibration.observed_experts import as_observed
from torchao_masquant.conductor.asymmetric import AsymmetricConductor
from torchao_masquant.conductor.conductor import Conductor
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.sequential.activations import ActivationStore, kept
from torchao_masquant.sequential.block_learner import BlockLearner
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.front import stored_call
from torchao_masquant.sequential.job import Job
from torchao_masquant.sequential.preflight import check_time
from torchao_masquant.sequential.writer import Writer

__all__ = ["Blocks"]


class Blocks:
    """The way through them, one that is loaded after the other.

    Args:
        job: that it is a part of.
        activations: what samples call the decoder with, and what the block before gave.
        writer: of what is found.
        before: tokens of each modality in the samples of the processes before this one.
    """

    def __init__(
        self,
        job: Job,
        activations: ActivationStore,
        writer: Writer,
        before: Sequence[int],
    ):
        self.job, self.activations, self.writer = job, activations, writer
        self.asymmetric: Optional[AsymmetricConductor] = None
        if job.options.asymmetric_calibration:
            self.asymmetric = AsymmetricConductor(job.router, job.options)
            self.conductor = self.asymmetric.conductor
        else:
            self.conductor = Conductor(
                job.router,
                job.options,
                job.max_statistics_bytes,
                team=job.team,
                before=before,
            )
        self.learner = None
        if job.options.epochs or self.asymmetric is not None:
            self.learner = BlockLearner(
                job.walk, activations, job.mine, job.options, job.team
            )

    def check_time(self, finished: Sequence[bool], limit: Optional[float]) -> None:
        """Measure, and raise where it would take too long.

        Args:
            finished: of each block, whether nothing is left to do.
            limit: in seconds; None for none.
        """
        job = self.job
        first = self._runs(0, replace=False)
        with job.disk.loaded(job.names[0]):
            start = time.perf_counter()
            next(first)
            if job.disk.device.type == "cuda":
                torch.cuda.synchronize(job.disk.device)
            passed = time.perf_counter() - start
        done = job.summary.tokens[job.mine[0]] or 1
        mine = sum(job.summary.tokens[index] or 1 for index in job.mine)

        def check() -> None:
            check_time(
                [
                    job.selected_of(i).shapes
                    for i, there in enumerate(finished)
                    if not there
                ],
                len(job.router.modalities),
                job.options,
                forward=passed * mine / done,
                device=job.disk.device,
                processes=job.team.size,
                limit=limit,
            )

        job.team.on_first(check)

    def _runs(self, index: int, *, replace: bool) -> Iterator[None]:
        """Run a block on each sample of this process in turn.

        Args:
            index: of the block.
            replace: put the block's own outputs in their place.
        """
        walk, activations = self.job.walk, self.activations
        for number in self.job.mine:
            call = stored_call(activations, number)
            previous = activations.get(f"hidden-{number}") if index else None
            block_call = walk.block_call(index, call, previous)
            output = walk.run_block(index, call, block_call)
            if replace:
                activations.put(f"hidden-{number}", kept(output))
            yield

    def _advance(self, index: int) -> None:
        # Bit for bit what the block gave when it was calibrated.
        with as_observed(self.job.selected_of(index).experts, self.job.router):
            for _ in self._runs(index, replace=True):
                pass

    def pass_by(self, index: int, store: BlockStore) -> None:
        """Run a block that is finished, and loaded.

        Args:
            index: of the block.
            store: that has what was found for it.
        """
        self._advance(index)
        if self.learner is not None:
            self.learner.learn(index, store.layers(index), done=True)

    def calibrate(self, index: int) -> None:
        """Observe, solve, learn and write a block, which is loaded."""
        chosen = self.job.selected_of(index)
        layers: dict[str, LayerRecipe] = {}
        if not chosen.layers:
            self._advance(index)
        elif self.asymmetric is not None and self.learner is not None:
            samples = self.learner.samples_at(index)
            layers = self.asymmetric.layers(chosen, samples)
            self._advance(index)
        else:
            first = self._runs(index, replace=False)
            passes = self.conductor.plan(chosen, functools.partial(next, first))

            def run(number: int) -> None:
                # Experts, where there are any, are observed in the last pass.
                last = number == len(passes)
                for _ in self._runs(index, replace=last):
                    pass

            layers = self.conductor.layers(chosen, passes, run)
        self.conductor.tell_left_out(chosen)
        if self.learner is not None:
            done = not self.job.options.epochs
            layers = self.learner.learn(index, layers, done=done)
        self.job.team.on_first(lambda: self.writer.write(index, layers))

    def tell(self) -> None:
        """What was noticed of all blocks."""
        if self.job.team.rank == 0:
            self.conductor.notices.tell()
