# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Block-by-block learning of a recipe's floating point parts."""

import contextlib
import copy
import itertools
import logging
import math
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.decoder_blocks import (
    RunsBlocks,
    capture_calls,
    decoder_blocks,
    forwards,
)
from torchao_masquant.learning.batch_gradient import BatchGradient
from torchao_masquant.learning.batches import batches, held_back
from torchao_masquant.learning.learnable_weight import LearnableWeight
from torchao_masquant.learning.together import Alone, Together
from torchao_masquant.learning.token_variation import TokenVariation, tokens_of
from torchao_masquant.linear import quantized_forward
from torchao_masquant.options import SolverOptions
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.samples import evaluation_mode
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["BlockTask", "frozen", "learn"]

_LOGGER = logging.getLogger(__name__)


@torch.inference_mode(False)
def learn(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    layers: Mapping[str, LayerRecipe],
    router: Router,
    options: SolverOptions,
    *,
    progress: bool = False,
    task: "Optional[type[BlockTask]]" = None,
) -> dict[str, LayerRecipe]:
    """Improve a solution by gradients, one block of the decoder after the other.

    The loss is MAS's reconstruction loss (arXiv 2603.04800, its section on MAS) of a
    block: target from the full-precision stream, input from the stream of the quantized
    blocks before it, the error of each modality relative to what varies in its target
    and weighed by ``options.weights_of``. The integers of the solution stay; see
    :class:`LearnableWeight` for what is learned. The samples run once through the
    model; after that only one block runs at a time. Every eighth sample is held back
    and decides which iterate is kept, the start among them.

    Args:
        model: with high-precision weights; left as it was.
        samples: as for ``calibrate``.
        layers: solution for linears of its decoder.
        router: that tells calibration's modalities.
        options: with ``epochs`` above zero, ``lr`` and ``batch_size``.
        progress: show a bar on a terminal.
        task: what a block is learned by; None for :class:`BlockTask`.

    Returns:
        Name to the learned part of the recipe. Never worse than its start on the
        samples held back.

    Raises:
        ValueError: the decoder is not a stack of blocks.
    """
    blocks = decoder_blocks(model, list(layers))
    modules = list(blocks.values())
    calls = capture_calls(model, modules, samples, router, progress=progress)
    learned = dict(layers)
    with evaluation_mode(model), frozen(model):
        exact = [call.hidden for call in calls]
        met = list(exact)
        bar = progress_bar(blocks.items(), desc="Learning", show=progress)
        for index, (name, block) in enumerate(bar):
            exact = [c.run(index, block, x) for c, x in zip(calls, exact)]
            block_task = (task or BlockTask)(
                name, block, index, learned, router.modalities, options, calls, Alone()
            )
            if block_task.linears:
                learned |= block_task.learn(met, exact)
            met = list(block_task.quantized_outputs(learned, met))
    return learned


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A model has no gradients inside."""
    training = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


class BlockTask:
    """One block: its quantized linears, and how far its output is from its target.

    Args:
        name: of the block in the model.
        block: in high precision.
        index: of the block among the decoder's.
        layers: solutions, those of its linears among them.
        modalities: names, base first.
        options: of learning.
        calls: this process's samples.
        together: the processes that learn, all samples shared among them.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        index: int,
        layers: Mapping[str, LayerRecipe],
        modalities: Sequence[str],
        options: SolverOptions,
        calls: Sequence[RunsBlocks],
        together: Together,
    ):
        self.together = together
        self.name, self.block, self.index = name, block, index
        self.modalities, self.options, self.calls = modalities, options, calls
        self.linears: dict[str, nn.Linear] = {
            f"{name}.{inner}": module
            for inner, module in block.named_modules()
            if f"{name}.{inner}" in layers and isinstance(module, nn.Linear)
        }
        self.layers = layers
        self.importances = options.weights_of(modalities)

    def _quantized(
        self, layers: Mapping[str, LayerRecipe]
    ) -> dict[str, MASQuantTensor]:
        return {
            name: layers[name].quantize(
                linear.weight.data,
                self.options.number_format,
                self.modalities,
                self.options.low_rank_bits,
            )
            for name, linear in self.linears.items()
        }

    @torch.no_grad()
    def quantized_outputs(
        self, layers: Mapping[str, LayerRecipe], inputs: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Outputs of the block as it will run, from integers, sample by sample."""
        weights = self._quantized(layers)

        def forward(name: str, ids: Any, x: torch.Tensor) -> torch.Tensor:
            return quantized_forward(self.linears[name], weights[name], ids)(x)

        for call, x in zip(self.calls, inputs):
            yield self._run(forward, call, x)

    def _run(
        self,
        forward: Callable[[str, Any, torch.Tensor], torch.Tensor],
        call: RunsBlocks,
        x: torch.Tensor,
    ) -> torch.Tensor:
        replaced = [
            (linear, partial(forward, name, call.ids))
            for name, linear in self.linears.items()
        ]
        with forwards(replaced):
            return call.run(self.index, self.block, x)

    @torch.enable_grad()
    def learn(
        self, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> dict[str, LayerRecipe]:
        """The linears' parts, learned; the start's where nothing better was found.

        All processes take the same steps and have the same result.
        """
        learnable = {
            name: LearnableWeight(self.layers[name], quantized)
            for name, quantized in self._quantized(self.layers).items()
        }
        parameters = [p for w in learnable.values() for p in w.parameters()]
        energies = self._energies(targets)
        counts = self.together.gather(len(inputs))
        count, first = sum(counts), sum(counts[: self.together.rank])
        mine = range(first, first + len(inputs))
        taught, judges = held_back(count)

        def forward(name: str, ids: Any, x: torch.Tensor) -> torch.Tensor:
            return learnable[name].linear(x, ids, self.linears[name].bias)

        def loss_of(number: int) -> torch.Tensor:
            i = number - first
            y = self._run(forward, self.calls[i], inputs[i])
            return self._loss(y, targets[i], self.calls[i].ids, energies)

        @torch.no_grad()
        def judged() -> float:
            own = [loss_of(number).item() for number in judges if number in mine]
            return math.fsum(itertools.chain(*self.together.gather(own)))

        generator = torch.Generator().manual_seed(self.index)
        epochs = [
            batches(taught, count, self.options.batch_size, generator)
            for _ in range(self.options.epochs)
        ]
        optimizer = torch.optim.Adam(parameters, lr=self.options.learning_rate)
        gradient = BatchGradient(parameters, self.together)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, sum(map(len, epochs))
        )
        start = least = judged()
        best = copy.deepcopy([p.detach() for p in parameters])
        for epoch in epochs:
            for batch in epoch:
                for number in batch:
                    if number in mine:
                        gradient.add(loss_of(number))
                gradient.finish(len(batch))
                optimizer.step()
                schedule.step()
            now = judged()
            if now < least:
                least, best = now, copy.deepcopy([p.detach() for p in parameters])
            if not math.isfinite(now) or now > 10 * start:
                self._warn_of_divergence(start, now)
                break
        if least >= start:
            return {name: self.layers[name] for name in self.linears}
        with torch.no_grad():
            for parameter, value in zip(parameters, best):
                parameter.copy_(value)
        return {name: weight.result() for name, weight in learnable.items()}

    def _warn_of_divergence(self, start: float, now: float) -> None:
        if self.together.rank == 0:
            _LOGGER.warning(
                "learning of %s diverged: the loss went from %.3g to %.3g; the best "
                "iterate is kept. A smaller lr than %g may do better.",
                self.name,
                start,
                now,
                self.options.learning_rate,
            )

    @torch.no_grad()
    def _energies(self, targets: Sequence[torch.Tensor]) -> list[float]:
        """Of each modality, what varies from token to token in the target, per token.

        Bit for bit those of one process: samples are added in their order, by one
        process after the other.
        """

        def add(variations: list[TokenVariation]) -> list[TokenVariation]:
            for y, call in zip(targets, self.calls):
                for index, variation in enumerate(variations):
                    variation.update(tokens_of(y, call.ids, index))
            return variations

        empty = [TokenVariation() for _ in self.modalities]
        return [found.energy for found in self.together.in_turn(add, empty)]

    def _loss(
        self,
        y: torch.Tensor,
        target: torch.Tensor,
        ids: Optional[torch.Tensor],
        energies: Sequence[float],
    ) -> torch.Tensor:
        error = (y.float() - target.float()).square().sum(-1)
        total = error.new_zeros(())
        for index, (energy, importance) in enumerate(zip(energies, self.importances)):
            if energy > 0:
                own = tokens_of(error[..., None], ids, index)
                total = total + importance / energy * own.sum()
        return total / error.numel()
