# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The blocks of a decoder, and what they were called with."""

import contextlib
from dataclasses import dataclass
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

from torchao_masquant.routing import Router
from torchao_masquant.samples import run_samples

__all__ = [
    "BlockCalls",
    "RunsBlocks",
    "capture_calls",
    "decoder_blocks",
    "forwards",
    "hidden_states",
    "is_cache",
]


def decoder_blocks(model: nn.Module, linears: Sequence[str]) -> dict[str, nn.Module]:
    """The blocks, in order, that hold linears.

    Args:
        model: a model with its decoder's blocks in one ``nn.ModuleList``.
        linears: names of linears of the decoder.

    Returns:
        Name in the model to block, of all blocks of the list.

    Raises:
        ValueError: there is no list of blocks that holds all of the linears.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(
            linear.startswith(f"{name}.") for linear in linears
        ):
            return {
                f"{name}.{index}": block for index, block in module.named_children()
            }
    raise ValueError(
        f"learning goes block by block, as asymmetric calibration and calibrating from disk "
        f"do, and no nn.ModuleList of {type(model).__name__} holds all of its {len(linears)} "
        f"linears, {linears[0]} among them: include the linears of one stack of blocks, "
        "or calibrate in memory without them."
    )


class RunsBlocks(Protocol):
    """One sample, for which blocks run on hidden states that are given."""

    @property
    def ids(self) -> Optional[torch.Tensor]:
        """(batch, sequence) modality ids, negative for padding; None: all base."""

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of one block for these hidden states."""


@dataclass
class BlockCalls:
    """One sample's way through the blocks.

    Attributes:
        hidden: (batch, sequence, H) that the first block was called with.
        keywords: of each block, what else it was called with.
        positional: of each block, its positional arguments behind the hidden states.
        added: of each block, what the model added to the output of the block before
            it (as DeepStack does), None where nothing.
        known: whether the modalities of the tokens are known.
        ids: (batch, sequence) they, negative for padding; None: all base.
    """

    hidden: torch.Tensor
    keywords: list[dict[str, Any]]
    positional: list[tuple[Any, ...]]
    added: list[Optional[torch.Tensor]]
    known: bool
    ids: Optional[torch.Tensor]

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of one block for these hidden states."""
        added = self.added[index]
        if added is not None:
            hidden = hidden + added
        return hidden_states(
            block(hidden, *self.positional[index], **self.keywords[index])
        )


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument is a cache of keys and values.

    transformers calls it ``past_key_values``, or ``cache`` from version 5.24 on.
    """
    return name.startswith("past_key_value") or any(
        kind.__name__ == "Cache" for kind in type(value).__mro__
    )


def hidden_states(output: Any) -> torch.Tensor:
    """Of what a block returns: the tensor itself, or the first of a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def capture_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    samples: Iterable[Mapping[str, Any]],
    router: Router,
    *,
    progress: bool,
) -> list[BlockCalls]:
    """Run each sample once through the model, towers and all, and note the calls.

    Masks and positions are kept as the model made them, shared between blocks where
    the model shares them; hidden states of the first block alone are kept.

    Raises:
        ValueError: a block is not called exactly once by each call of the model.
    """
    calls: list[BlockCalls] = []
    state: dict[str, Any] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {
                name: value for name, value in kwargs.items() if name != "hidden_states"
            }
            # A cache would grow by every call that is repeated.
            rest.update({n: None for n, value in rest.items() if is_cache(n, value)})
            if "use_cache" in rest:
                rest["use_cache"] = False
            if index == 0:
                tokens = router.call.known, router.call.ids
                calls.append(BlockCalls(hidden.detach(), [], [], [], *tokens))
            call = calls[-1]
            if len(call.keywords) != index:
                raise ValueError(
                    f"block {index} of the decoder is not called once, after the block "
                    "before it: neither learning nor asymmetric calibration can follow "
                    "this model, calibrate without them."
                )
            added = None
            if index and not torch.equal(hidden, state["output"]):
                added = hidden.detach() - state["output"]
            call.keywords.append(rest)
            call.positional.append(tuple(args[1:]))
            call.added.append(added)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        state["output"] = hidden_states(output).detach()

    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(
                block.register_forward_pre_hook(before(index), with_kwargs=True)
            )
            handles.append(block.register_forward_hook(after))
        router.attach(model)
        run_samples(model, samples, router, progress=progress, description="Capturing")
    finally:
        router.detach(model)
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def forwards(
    replaced: Sequence[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Other functions in place of the forward of some modules."""
    saved = [(module, module.__dict__.get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, before in saved:
            del module.forward
            if before is not None:
                module.forward = before
