# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One input after the other, each behind what is quantized already."""

import contextlib
from collections import Counter
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Protocol,
    Sequence,
)

import torch
from torch import nn

from torchao_masquant.calibration.exact_inputs import ExactInputs
from torchao_masquant.conductor.conductor import Conductor
from torchao_masquant.decoder_blocks import (
    BlockCalls,
    capture_calls,
    decoder_blocks,
    forwards,
)
from torchao_masquant.learning.learn import BlockTask, frozen
from torchao_masquant.learning.together import Alone
from torchao_masquant.linear import quantized_forward
from torchao_masquant.options import SolverOptions
from torchao_masquant.progress import progress_bar
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.samples import evaluation_mode
from torchao_masquant.selection import Selected
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["AsymmetricConductor", "BlockSample", "calibrate_blocks"]


class BlockSample(Protocol):
    """A sample of this process at one block, in both streams."""

    @property
    def ids(self) -> Optional[torch.Tensor]:
        """(batch, sequence) modality ids, negative for padding; None: all base."""

    def run_exact(self) -> object:
        """Run the block behind blocks of full precision, its linears routed."""

    def run_met(self) -> object:
        """Run it behind quantized ones, likewise."""


class AsymmetricConductor:
    """Finds the layers of a recipe for a block after the other, as they will be met.

    The linears that share an input are observed, solved for and quantized before the
    next are observed, behind them. All that a block reads is observed in both streams:
    what the quantized one lacks is made up for
    (:func:`~torchao_masquant.solver.asymmetric.corrected`).

    Args:
        router: that tells the modalities of the tokens that blocks are called with.
        options: of the solution.
        progress: show a bar on a terminal.
    """

    def __init__(
        self, router: Router, options: SolverOptions, *, progress: bool = False
    ):
        self.modalities, self.options = router.modalities, options
        self._exact = ExactInputs()
        # Of no bytes: each input has a pass of its own.
        self.conductor = Conductor(
            router, options, 0, exact=self._exact, progress=progress
        )

    def layers(
        self, block: Selected, samples: Sequence[BlockSample], *, is_last: bool = False
    ) -> dict[str, LayerRecipe]:
        """Observe a block, and solve for it.

        Args:
            block: what is selected of it.
            samples: all of them.
            is_last: whether no block follows; notices are told before its last input is
                solved for.

        Returns:
            Name to layer, as :meth:`Conductor.layers`.

        Raises:
            ValueError: as :meth:`Conductor.layers`; a linear is called with other
                tokens in one stream than in the other, or twice.
        """
        found: dict[str, LayerRecipe] = {}
        weights: dict[str, MASQuantTensor] = {}
        passes = self.conductor.plan(block, lambda: _show(block.linears, samples))
        for number, names in enumerate(passes, start=1):
            part = block.where(names.__contains__)

            def run(_: int) -> None:
                for sample in samples:
                    with self._exact.read(), _until_called(part.linears.values()):
                        sample.run_exact()
                    with _until_called(part.linears.values()):
                        with _quantized(block.linears, weights, sample.ids):
                            sample.run_met()

            solved = self.conductor.layers(
                part, [names], run, is_last=is_last and number == len(passes)
            )
            found |= solved
            for name, layer in solved.items():
                weights[name] = layer.quantize(
                    block.linears[name].weight.data,
                    self.options.number_format,
                    self.modalities,
                    self.options.low_rank_bits,
                )
        return found


@contextlib.contextmanager
def _quantized(
    linears: Mapping[str, nn.Linear],
    weights: Mapping[str, MASQuantTensor],
    ids: Optional[torch.Tensor],
) -> Iterator[None]:
    """Linears compute inside with quantized weights, as far as there are any."""
    replaced = [
        (linears[name], quantized_forward(linears[name], weight, ids))
        for name, weight in weights.items()
    ]
    with forwards(replaced):
        yield


def _show(linears: Mapping[str, nn.Linear], samples: Sequence[BlockSample]) -> None:
    """Run a block until each of its linears was called.

    Raises:
        ValueError: one is called twice: its input may be behind its own output.
    """
    called: Counter[str] = Counter()
    left = set(linears)

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: called.update([name])

    handles = [m.register_forward_pre_hook(count(n)) for n, m in linears.items()]
    try:
        for sample in samples:
            called.clear()
            sample.run_exact()
            twice = [name for name, times in called.items() if times > 1]
            if twice:
                raise ValueError(
                    f"{twice[0]} is called more than once by a call of the model, so that "
                    "there is no one input behind what is quantized before it: exclude "
                    "it, or calibrate with asymmetric_calibration=False."
                )
            left -= called.keys()
            if not left:
                break
    finally:
        for handle in handles:
            handle.remove()


class _AllCalledError(Exception):
    """Ends a run that has shown what it is for."""


@contextlib.contextmanager
def _until_called(modules: Iterable[nn.Module]) -> Iterator[None]:
    """End what runs inside once each of some modules was called."""
    left = list(modules)

    def called(module: nn.Module, args: Any, output: Any) -> None:
        left[:] = [other for other in left if other is not module]
        if not left:
            raise _AllCalledError

    handles = [module.register_forward_hook(called) for module in list(left)]
    try:
        yield
    except _AllCalledError:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _InMemory:
    """A sample on its way through the blocks of a model in memory."""

    def __init__(self, call: BlockCalls, router: Router):
        self.call, self.router = call, router
        #: how it is called in the quantized stream
        self.call_met = call.apart()
        self.exact = self.met = call.hidden
        self.index, self.block = -1, nn.Module()

    @property
    def ids(self) -> Optional[torch.Tensor]:
        return self.call.ids

    def enter(self, index: int, block: nn.Module) -> None:
        self.index, self.block = index, block

    def run_exact(self) -> torch.Tensor:
        return self._run(self.call, self.exact)

    def run_met(self) -> torch.Tensor:
        return self._run(self.call_met, self.met)

    def _run(self, call: BlockCalls, hidden: torch.Tensor) -> torch.Tensor:
        with self.router.repeated(call.known, call.ids):
            return call.run(self.index, self.block, hidden)


@torch.inference_mode(False)
def calibrate_blocks(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    selected: Selected,
    router: Router,
    options: SolverOptions,
    *,
    progress: bool = False,
) -> tuple[dict[str, LayerRecipe], Conductor, int]:
    """Find the layers of a recipe for a model in memory.

    Args:
        model: left as it was.
        samples: as for :func:`~torchao_masquant.calibrate`; run through it once, and
            then through one block at a time.
        selected: linears of its decoder's blocks.
        router: that tells the modalities of the samples' tokens.
        options: of the solution.
        progress: show a bar on a terminal.

    Returns:
        Name to layer; who found them, and knows the tokens; and how many samples there
        were.

    Raises:
        ValueError: the decoder is not a stack of blocks that holds all of the linears;
            else as :meth:`AsymmetricConductor.layers`.
    """
    blocks = decoder_blocks(model, list(selected.layers))
    conductor = AsymmetricConductor(router, options)
    found: dict[str, LayerRecipe] = {}
    with evaluation_mode(model), frozen(model):
        calls = capture_calls(
            model, list(blocks.values()), samples, router, progress=progress
        )
        ways = [_InMemory(call, router) for call in calls]
        chosen = {name: selected.where(_under(name)) for name in blocks}
        last = [name for name, block in chosen.items() if block.linears][-1]
        bar = progress_bar(blocks.items(), desc="Blocks", show=progress)
        for index, (name, module) in enumerate(bar):
            for way in ways:
                way.enter(index, module)
            layers: dict[str, LayerRecipe] = {}
            if chosen[name].linears:
                layers = conductor.layers(chosen[name], ways, is_last=name == last)
            exact: list[torch.Tensor] = []
            if options.epochs or name != last:
                exact = [way.run_exact() for way in ways]
            met = [way.met for way in ways]
            task = BlockTask(
                name,
                module,
                index,
                layers,
                router.modalities,
                options,
                [way.call_met for way in ways],
                Alone(),
            )
            if options.epochs and layers:
                layers = task.learn(met, exact)
            found |= layers
            if name == last:
                break
            quantized = task.quantized_outputs(layers, met)
            for way, dense, behind in zip(ways, exact, quantized):
                way.exact, way.met = dense, behind
    return found, conductor.conductor, len(calls)


def _under(block: str) -> Any:
    return lambda name: name.startswith(f"{block}.")
