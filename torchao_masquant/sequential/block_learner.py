# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One block in both streams, with the samples' activations in a store."""

import collections.abc
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.conductor.team import Team
from torchao_masquant.decoder_blocks import hidden_states
from torchao_masquant.learning.learn import BlockTask
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.sequential.activations import ActivationStore, kept
from torchao_masquant.sequential.decoder_walk import (
    BlockCall,
    DecoderCall,
    DecoderWalk,
)

__all__ = ["BlockLearner"]


class BlockLearner:
    """What :func:`torchao_masquant.learning.learn` does, one loaded block at a time.

    Beside the hidden states of the full-precision stream ("hidden-0", ...) the store
    holds those of the quantized one ("met-0", ...).

    Args:
        walk: through the decoder.
        activations: the store.
        samples: numbers of the samples in it, this process's.
        options: of the solution; learning takes ``epochs`` above zero.
        team: that shares the samples.
    """

    def __init__(
        self,
        walk: DecoderWalk,
        activations: ActivationStore,
        samples: Sequence[int],
        options: SolverOptions,
        team: Team,
    ):
        self.walk, self.activations = walk, activations
        self.samples, self.options, self.team = samples, options, team

    def samples_at(self, index: int) -> "list[_Call]":
        """This process's samples at a block, which is loaded."""
        return [_Call(self, number, index) for number in self.samples]

    def learn(
        self, index: int, layers: Mapping[str, LayerRecipe], *, done: bool
    ) -> dict[str, LayerRecipe]:
        """Learn, and run the quantized block.

        Args:
            index: of the block, which is loaded, and whose outputs for the
                full-precision stream are in the store.
            layers: solutions for its linears, on process 0; where they are learned
                already, on all.
            done: nothing is left to learn.

        Returns:
            The learned ones, the same on all processes.

        Raises:
            TeamError: another process has died, or learned something else.
        """
        if not done:
            layers = self.team.spread(layers)
        calls = self.samples_at(index)
        for call in calls:
            inputs = call.block_call(index)
            hidden = inputs.args[0] if inputs.args else inputs.kwargs["hidden_states"]
            self.activations.put(f"input-{call.number}", kept(hidden))
        task = BlockTask(
            self.walk.names[index],
            self.walk.blocks[index],
            index,
            layers,
            self.walk.router.modalities,
            self.options,
            calls,
            self.team,
        )
        inputs_met = _Stored(self, "input")
        learned = dict(layers)
        if layers and not done:
            learned = task.learn(inputs_met, _Stored(self, "hidden"))
            self.team.agree(self.walk.names[index], learned)
        outputs = task.quantized_outputs(learned, inputs_met)
        for number, output in zip(self.samples, outputs):
            exact = self.activations.get(f"hidden-{number}")
            self.activations.put(f"met-{number}", _with_hidden(exact, kept(output)))
        return learned


class _Stored(collections.abc.Sequence):
    """Hidden states of one kind, of all samples, read when they are asked for."""

    def __init__(self, learner: BlockLearner, kind: str):
        self.learner, self.kind = learner, kind

    def __len__(self) -> int:
        return len(self.learner.samples)

    def __getitem__(self, position: Any) -> Any:
        number = self.learner.samples[position]
        tree = self.learner.activations.get(f"{self.kind}-{number}")
        return hidden_states(tree).to(self.learner.walk.device)


class _Call:
    """One sample at a block, as ``BlockTask`` wants it, and in both streams."""

    def __init__(self, learner: BlockLearner, number: int, index: int):
        self.learner, self.number, self.index = learner, number, index

    @property
    def call(self) -> DecoderCall:
        return DecoderCall(**self.learner.activations.get(f"call-{self.number}"))

    @property
    def ids(self) -> Optional[torch.Tensor]:
        ids = self.call.ids
        return None if ids is None else ids.to(self.learner.walk.device)

    def block_call(self, index: int) -> BlockCall:
        """What a block is called with in the quantized stream."""
        return self._block_call(index, "met")

    def _block_call(self, index: int, stream: str) -> BlockCall:
        previous = None
        if index:
            previous = self.learner.activations.get(f"{stream}-{self.number}")
        return self.learner.walk.block_call(index, self.call, previous)

    def run_exact(self) -> Any:
        return self._run("hidden")

    def run_met(self) -> Any:
        return self._run("met")

    def _run(self, stream: str) -> Any:
        found = self._block_call(self.index, stream)
        return self.learner.walk.run_block(self.index, self.call, found)

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of a block for these hidden states."""
        found = self.block_call(index)
        args, kwargs = list(found.args), dict(found.kwargs)
        if args:
            args[0] = hidden
        else:
            kwargs["hidden_states"] = hidden
        return hidden_states(block(*args, **kwargs))


def _with_hidden(tree: Any, hidden: torch.Tensor) -> Any:
    """What a block returned, with other hidden states."""
    if isinstance(tree, torch.Tensor):
        return hidden
    return type(tree)([hidden, *tree[1:]])
