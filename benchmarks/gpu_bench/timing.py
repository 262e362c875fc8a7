# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Interleaved timings on a GPU, by CUDA events."""

import statistics
import time
from dataclasses import dataclass
from typing import Callable, Sequence

import torch

__all__ = ["Timing", "captured", "measure"]

# Seconds of replays before the first round: clocks rise under load.
_WARM_UP = 0.1
_ROUNDS = 5

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, of one call.

    Attributes:
        graph: microseconds, of calls in a CUDA graph: the kernels alone.
        eager: microseconds, of calls one after another from Python: where launching
            takes longer than running, that is what is measured.
        rounds: of which they are the medians.
    """

    graph: float
    eager: float
    rounds: int


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of calls, one after another; two of them are run before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _timed(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    return begin, end


def measure(candidates: dict[str, Sequence[Call]], seconds: float) -> dict[str, Timing]:
    """Time candidates in turn.

    Args:
        candidates: name to calls that do the same on different copies of a weight, so
            that no weight is still in the cache from the call before.
        seconds: that all of them may take together, in at least five rounds.
    """
    graphs = {name: captured(calls) for name, calls in candidates.items()}

    def in_turn(name: str) -> Callable[[], object]:
        return lambda: [call() for call in candidates[name]]

    graph_us: dict[str, list[float]] = {name: [] for name in candidates}
    eager_us: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    started = time.perf_counter()
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() - started < seconds:
        events = {
            name: (_timed(graphs[name].replay), _timed(in_turn(name)))
            for name in candidates
        }
        torch.cuda.synchronize()
        for name, (replayed, eager) in events.items():
            for taken, (begin, end) in ((graph_us, replayed), (eager_us, eager)):
                each = begin.elapsed_time(end) / len(candidates[name])
                taken[name].append(1e3 * each)
        rounds += 1
    return {
        name: Timing(
            statistics.median(graph_us[name]), statistics.median(eager_us[name]), rounds
        )
        for name in candidates
    }
