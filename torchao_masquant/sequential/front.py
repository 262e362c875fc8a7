# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What lies in front of a decoder: samples run through it once, up to the blocks."""

import functools
from typing import Any, Iterable, Iterator, Mapping, Sequence

from torchao_masquant.models.parts import heads_of, token_reader
from torchao_masquant.progress import progress_bar
from torchao_masquant.sequential.activations import ActivationStore
from torchao_masquant.sequential.block_store import BlockStore
from torchao_masquant.sequential.decoder_walk import DecoderCall
from torchao_masquant.sequential.job import Job

__all__ = ["Front", "stored_call"]


def stored_call(activations: ActivationStore, index: int) -> DecoderCall:
    """What a sample calls the decoder with."""
    return DecoderCall(**activations.get(f"call-{index}"))


class Front:
    """Embeddings and towers.

    Args:
        job: that it is a part of.
    """

    def __init__(self, job: Job):
        self.job = job

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the weights that samples need on their way to the decoder."""
        model = self.job.disk.model
        reader = token_reader(model)
        blocks = self.job.in_blocks
        # The head runs where the decoder is the whole model, which has it inside.
        idle = () if self.job.walk.decoder is reader else heads_of(reader)
        read = {id(m) for m in reader.modules()} - {id(head) for head in idle}
        return [
            name
            for name in self.job.disk.names_in_files
            if name not in blocks
            and id(model.get_submodule(name.rpartition(".")[0])) in read
        ]

    def capture(
        self,
        samples: Iterable[Mapping[str, Any]],
        activations: ActivationStore,
        store: BlockStore,
    ) -> list[int]:
        """Run this process's samples up to the decoder; prove that it can be walked.

        Args:
            samples: all of them.
            activations: takes what they call the decoder with.
            store: of what an interrupted run has finished, the proof among it.

        Returns:
            Tokens of each modality in the samples of the processes before this one.
        """
        disk, walk, team = self.job.disk, self.job.walk, self.job.team
        front = self.names
        counts = [0] * len(self.job.router.modalities)
        with disk.loaded(front):
            bar = progress_bar(
                self._own(samples),
                desc="Embedding",
                total=len(self.job.mine),
                show=self.job.shows_bars,
            )
            for index, sample in bar:
                call = walk.capture(sample)
                self._count(index, call, counts)
                activations.put(f"call-{index}", vars(call))
        own = [name for name in front if self._of_decoder(name)]
        proof = team.on_first(lambda: store.finished("proof"))
        if proof is None:
            with disk.loaded(own), walk.watching() as used:
                for index in self.job.summary.kinds.values():
                    if index in self.job.mine:
                        walk.prove(
                            stored_call(activations, index),
                            lambda block: disk.loaded(self.job.names[block]),
                        )
            modules = sorted({name for part in team.gather(used) for name in part})
            proof = {"modules": modules}
            team.on_first(lambda: store.finish("proof", note=proof))
        disk.load(n for n in own if self._is_used(n, set(proof["modules"])))
        gathered = team.gather(counts)
        tokens = dict(zip(self.job.router.modalities, map(sum, zip(*gathered))))
        team.on_first(lambda: store.finish("tokens", note={"tokens": tokens}))
        before = gathered[: team.rank]
        return [sum(column) for column in zip(*before)] or [0] * len(counts)

    def _own(
        self, samples: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """This process's samples, with their numbers."""
        if isinstance(samples, Sequence):
            # Those of others are not made.
            yield from ((index, samples[index]) for index in self.job.mine)
            return
        for index, sample in enumerate(samples):
            if index in self.job.mine:
                yield index, sample

    @functools.cached_property
    def _decoder_name(self) -> str:
        modules = self.job.disk.model.named_modules()
        return next(name for name, module in modules if module is self.job.walk.decoder)

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
            counts[0] += self.job.summary.tokens[index] or 0
        else:
            for modality in range(len(counts)):
                counts[modality] += int((call.ids == modality).sum())
