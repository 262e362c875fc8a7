# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A decoder run one block at a time, with the model's own code between the blocks.

What a decoder does around its blocks differs: masks and rotary positions in all of them,
features added between layers (DeepStack), inputs of each layer's own, copies of the hidden
states. None of it is traced, copied or rewritten here. To find what block k is called
with, the decoder's own ``forward`` runs, with stand-ins for the blocks: those before k - 1
return something of the right shape, block k - 1 returns what it did return, and block k
stops the run and hands its arguments over. That costs next to nothing, since blocks are
where the time goes, and it needs no block's weights. The towers and embeddings in front
of the decoder run once.

It is right if a block's output depends on the sample through its arguments, and its
arguments on earlier blocks through the output of the block just before it. Decoders that
hand keys and values from layer to layer behind that interface (in a cache) are not of
this kind. So nothing is assumed: :meth:`DecoderWalk.prove` runs samples through the
decoder's own forward, blocks loaded one by one, and compares each block's arguments and
output bit for bit with those of the walk.
"""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.decoder_blocks import forwards
from torchao_masquant.routing import Router
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import decoder_of
from torchao_masquant.sequential.activations import kept, tree_map

__all__ = ["BlockCall", "DecoderCall", "DecoderWalk"]


@dataclass
class DecoderCall:
    """What a sample's call of the decoder was: one entry of the activations.

    Attributes:
        args: positional arguments, caches left out, on the CPU.
        kwargs: keyword arguments.
        known: whether the modalities of its tokens are known.
        ids: (batch, sequence) modality ids, negative for padding; None: all base.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    known: bool
    ids: Optional[torch.Tensor]


@dataclass
class BlockCall:
    """What one block is called with for one sample, on the device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ReachedError(Exception):
    """Ends a run where it has given what it was for."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.call = BlockCall(args, kwargs)


class DecoderWalk:
    """Steps through the blocks of a model's decoder.

    Args:
        model: may be on the meta device but for what is to run.
        blocks: name in the model to block, in order.
        router: that tells the modalities of the samples' tokens.
        device: where blocks run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        router: Router,
        device: torch.device,
    ):
        self.model, self.router, self.device = model, router, device
        self.decoder = decoder_of(model)
        self.names = list(blocks)
        self.blocks = list(blocks.values())

    def capture(self, sample: Mapping[str, Any]) -> DecoderCall:
        """Run a sample up to the decoder, through embeddings and towers.

        Raises:
            ValueError: the model does not call its decoder.
        """
        decoder = self.decoder
        signature = inspect.signature(decoder.forward)

        @functools.wraps(decoder.forward)
        def reached(*args: Any, **kwargs: Any) -> None:
            if "use_cache" in signature.parameters:
                kwargs["use_cache"] = False
            call = self.router.call
            state["call"] = DecoderCall(
                kept(args), kept(kwargs), call.known, kept(call.ids)
            )
            raise _ReachedError(args, kwargs)

        state: dict[str, DecoderCall] = {}
        inputs = tree_map(lambda t: t.to(self.device), dict(sample))
        with forwards([(decoder, reached)]):
            self.router.attach(self.model)
            try:
                run_samples(
                    self.model, [inputs], self.router, progress=False, description=""
                )
            except _ReachedError:
                pass
            finally:
                self.router.detach(self.model)
        if "call" not in state:
            raise ValueError(
                f"{type(self.model).__name__} does not call its decoder: use "
                "calibrate() with the model in memory."
            )
        return state["call"]

    @torch.no_grad()
    def block_call(self, index: int, call: DecoderCall, previous: Any) -> BlockCall:
        """What a block is called with.

        Args:
            index: of the block.
            call: the sample's.
            previous: output of the block before it, as it is kept; None for the first.
        """
        previous = tree_map(lambda t: t.to(self.device), previous)
        # Written to by some decoders: never what is kept.
        stand_in = tree_map(torch.clone, previous) if index > 1 else None
        position = iter(range(index + 1))

        def stand_in_for(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if number != next(position):
                    raise ValueError(f"block {number} is not called in its order")
                if number == index:
                    raise _ReachedError(args, kwargs)
                if number == index - 1:
                    return tree_map(torch.clone, previous)
                return stand_in

            return forward

        replaced = [
            (block, stand_in_for(number))
            for number, block in enumerate(self.blocks[: index + 1])
        ]
        args, kwargs = tree_map(
            lambda t: t.to(self.device), (list(call.args), call.kwargs)
        )
        with forwards(replaced), self.routed(call):
            try:
                self.decoder(*args, **kwargs)
            except _ReachedError as reached:
                return reached.call
        raise ValueError(f"block {index} is not called")

    @torch.no_grad()
    def run_block(self, index: int, call: DecoderCall, block_call: BlockCall) -> Any:
        """Output of a block, whose weights are loaded, for one sample."""
        with self.routed(call):
            return self.blocks[index](*block_call.args, **block_call.kwargs)

    def routed(self, call: DecoderCall) -> contextlib.AbstractContextManager[None]:
        """Let linears that run inside know the modalities of a sample's tokens."""
        return self.router.repeated(call.known, call.ids)

    @torch.no_grad()
    def prove(
        self,
        call: DecoderCall,
        loaded: Callable[[int], contextlib.AbstractContextManager],
    ) -> None:
        """Compare the walk with the decoder's own forward, for one sample.

        Args:
            call: the sample's.
            loaded: context manager that has the weights of a block there inside.

        Raises:
            ValueError: a block's arguments or its output are others by themselves.
        """
        previous: Any = None

        def own(index: int) -> Callable[..., Any]:
            original = self.blocks[index].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal previous
                with loaded(index):
                    try:
                        alone = self.block_call(index, call, previous)
                    except Exception as error:
                        raise self._refusal(index, str(error)) from error
                    if not _equal(
                        kept((args, kwargs)), kept((alone.args, alone.kwargs))
                    ):
                        raise self._refusal(index, "its arguments differ")
                    try:
                        repeated = kept(original(*alone.args, **alone.kwargs))
                    except Exception as error:
                        raise self._refusal(index, str(error)) from error
                    output = original(*args, **kwargs)
                if not _equal(kept(output), repeated):
                    raise self._refusal(index, "its output differs")
                previous = kept(output)
                return output

            return forward

        replaced = [(block, own(number)) for number, block in enumerate(self.blocks)]
        args, kwargs = tree_map(
            lambda t: t.to(self.device), (list(call.args), call.kwargs)
        )
        with forwards(replaced), self.routed(call):
            self.decoder(*args, **kwargs)

    def _refusal(self, index: int, why: str) -> ValueError:
        return ValueError(
            f"{self.names[index]} computes something else by itself than in the "
            f"decoder ({why.rstrip('.')}), so it cannot be calibrated block by block: "
            "use calibrate() with the model in memory."
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Names of the modules outside of the blocks that run inside."""
        inside = {id(m) for block in self.blocks for m in block.modules()}
        used: set[str] = set()
        handles = []

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args: used.add(name)

        for name, module in self.model.named_modules():
            if id(module) not in inside:
                handles.append(module.register_forward_pre_hook(hook(name)))
        try:
            yield used
        finally:
            for handle in handles:
                handle.remove()


def _equal(first: Any, second: Any) -> bool:
    """Whether nested containers hold the same, bit for bit; nan equals nan."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and bool(((first == second) | (first != first) & (second != second)).all())
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            _equal(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second
