# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Timing the decoders of two models in turns."""

import contextlib
import inspect
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional

import torch
from torch import nn

from torchao_masquant.evaluation.weights import quantized_linears
from torchao_masquant.models.parts import token_reader
from torchao_masquant.progress import progress_bar
from torchao_masquant.routing import token_modalities
from torchao_masquant.selection import decoder_of

__all__ = ["TimedCall", "compare_decoders"]

_WARM_UPS = 2


@dataclass(frozen=True)
class TimedCall:
    """One kind of call.

    Attributes:
        call: "prefill, base", "prefill, mixed" or "decode".
        tokens: of the call.
        dense_ms: median of the original.
        quantized_ms: median of the quantized one.
    """

    call: str
    tokens: int
    dense_ms: float
    quantized_ms: float

    @property
    def ratio(self) -> float:
        """How many times as fast the quantized one is."""
        return self.dense_ms / self.quantized_ms


@torch.no_grad()
def compare_decoders(
    dense: nn.Module,
    quantized: nn.Module,
    *,
    tokens: int,
    rounds: int,
    compiled: bool = True,
) -> list[TimedCall]:
    """Time prefill and decode of two models' decoders, one call of each in turns.

    Args:
        dense: a transformers model.
        quantized: the same, quantized.
        tokens: of a prefill, and in the cache of a decode step.
        rounds: pairs of calls that are timed.
        compiled: compile each decoder, as one graph for any length.

    Raises:
        ValueError: a model has no decoder.
    """
    decoders: list[Any] = [decoder_of(model) for model in (dense, quantized)]
    if compiled:
        for decoder in decoders:
            decoder.compile(fullgraph=True, dynamic=True)
    reader = token_reader(dense)
    embedding = reader.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, tokens, embedding.shape[1], generator=generator)
    embeds = embeds.to(embedding.device, embedding.dtype)
    linears = quantized_linears(quantized)
    routed = any(linear.routed for linear in linears.values())
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=embedding.device)
    # Modalities come in spans.
    ids[:, tokens // 2 :] = 1

    calls: list[tuple[str, int, Optional[torch.Tensor], bool]] = [
        ("prefill, base", tokens, None, False)
    ]
    if routed:
        calls.append(("prefill, mixed", tokens, ids, False))
    calls.append(("decode", 1, None, True))
    rows = []
    count = rounds + _WARM_UPS
    with (
        # Both are graphs of one function to Dynamo, which gives up after eight.
        torch._dynamo.config.patch(recompile_limit=64),
        progress_bar(total=len(calls) * count, desc="Timing") as bar,
    ):
        for name, length, modalities, cached in calls:
            with _told(quantized, modalities):
                steps = [
                    _decode(decoder, embeds, count)
                    if cached
                    else _prefill(decoder, embeds)
                    for decoder in decoders
                ]
                rows.append(_timed(name, length, steps, rounds, bar))
    return rows


@contextlib.contextmanager
def _told(model: nn.Module, ids: Optional[torch.Tensor]) -> Iterator[None]:
    if ids is None and not any(
        linear.routed for linear in quantized_linears(model).values()
    ):
        yield
        return
    with token_modalities(model, ids):
        yield


def _prefill(decoder: Any, embeds: torch.Tensor) -> Callable[[], Any]:
    return lambda: decoder(inputs_embeds=embeds, use_cache=False)


def _decode(decoder: Any, embeds: torch.Tensor, count: int) -> Callable[[], Any]:
    """One more token at each call, the prompt's in the cache; ``count`` calls."""
    from transformers import StaticCache

    length = embeds.shape[1]
    cache = StaticCache(config=decoder.config, max_cache_len=length + count)
    # Renamed in transformers 5.
    named = inspect.signature(decoder.forward).parameters
    name = "cache" if "cache" in named else "past_key_values"
    decoder(inputs_embeds=embeds, use_cache=True, **{name: cache})
    token = embeds[:, :1]
    return lambda: decoder(inputs_embeds=token, use_cache=True, **{name: cache})


def _timed(
    name: str, tokens: int, steps: list[Callable[[], Any]], rounds: int, bar: Any
) -> TimedCall:
    for _ in range(_WARM_UPS):
        for step in steps:
            step()
        bar.update()
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for step, found in zip(steps, seconds):
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            found.append(time.perf_counter() - start)
        bar.update()
    dense, quantized = seconds
    return TimedCall(
        name,
        tokens,
        1e3 * statistics.median(dense),
        1e3 * statistics.median(quantized),
    )


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
