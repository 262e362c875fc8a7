# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model under the load of a server, dense and quantized.

    python benchmarks/serving_load.py [--calls N] [--generated N] [--json PATH]

One model, its language model compiled, is called

- by threads at once: prompts of text, images, sounds and both, of several lengths, and
  calls that raise half way, which must leave nothing behind;
- by ``generate()``, for requests that arrive at random times (exponential intervals,
  at a rate of 0.7 of what one thread was seen to serve).

Every result is that of the same call made alone, bit for bit, or of one whose passes ran
without a compiled graph in part (``serving_bench/alone.py``); all else counts as wrong.
What the process holds is looked at after every hundredth of the calls, when garbage has
been collected. Latencies count from a request's arrival.

Dynamo may compile again where threads take turns between the graphs of one function; in
the rows with a lock, one call runs at a time. Each model has a process of its own; the
dense one tells what of the growth is torch's and transformers'.
"""

import argparse
import array
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from serving_bench.alone import Call, Inputs, Results, eager_passes, equal, made_alone
from serving_bench.memory import Held, growth, held
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

from torchao_masquant import SCHEMES, calibrate, masquant_config
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.kernels.cpu_lowering import prepare
from torchao_masquant.routing import router_of
from torchao_masquant.testing import digits

_NEW_TOKENS = 2
_UTILISATION = 0.7
_KINDS = ("text", "image", "audio", "both")
_REFUSED = (ValueError, RuntimeError)


@dataclass
class Load:
    """What a load did. Growth is for 1,000 calls, over the second half of them.

    Attributes:
        model: "dense" or the scheme.
        load: its name.
        requests: answered or refused.
        raised: refused, as they should be.
        eager: results of a call that ran in part without a graph.
        wrong: results that no call made alone gives, and calls that left ids behind.
        p50_ms: half of the answers took no longer; so on for ``p90_ms``, ``p99_ms``.
        per_second: answers.
        graphs: compiled while it ran.
        resident_mib: at its end.
        resident_growth_mib: of resident memory.
        resident_error_mib: that slope's standard error; so on for those below.
        allocated_growth_mib: of what malloc has given and not got back.
        blocks_growth: of Python's allocator.
    """

    model: str
    load: str
    requests: int
    raised: int
    eager: int
    wrong: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_second: float
    graphs: int
    resident_mib: float
    resident_growth_mib: float
    resident_error_mib: float
    allocated_growth_mib: float
    allocated_error_mib: float
    blocks_growth: float
    blocks_error: float


#: (name of the kind, inputs, what the call made alone gave; None: it raised)
Request = tuple[str, Inputs, Optional[Results]]


def prompts(count: int) -> list[tuple[str, Inputs]]:
    """Prompts of every kind, of different contents and lengths; some are broken."""
    made = []
    for i in range(count):
        kind = _KINDS[i % len(_KINDS)]
        inputs = digits.prompt(kind, i // len(_KINDS))
        for name in ("input_ids", "attention_mask"):
            tail = inputs[name][:, -1:].expand(-1, i % 5)
            inputs[name] = torch.cat((inputs[name], tail), dim=1)
        made.append((kind, inputs))
        if kind == "image" and i % 8 == 1:
            # One placeholder more than there are features for: found out after routing.
            ids = inputs["input_ids"]
            placeholder = ids.mode().values[:, None]
            broken = {
                **inputs,
                "input_ids": torch.cat((ids[:, :1], placeholder, ids[:, 1:]), dim=1),
                "attention_mask": torch.ones(1, ids.shape[1] + 1, dtype=torch.long),
            }
            made.append(("broken", broken))
    return made


def percentiles(latencies: Sequence[float]) -> list[float]:
    return [float(v) * 1e3 for v in np.percentile(latencies, (50, 90, 99))]


class Server:
    """Answers requests on threads, and keeps account."""

    def __init__(
        self,
        model: Any,
        call: Call,
        requests: list[Request],
        lock: contextlib.AbstractContextManager,
    ):
        self.model = model
        self.router = router_of(model)
        self.call = call
        self.requests = requests
        self.lock = lock
        # Arrays, and no futures kept: an account that grows would be found as growth.
        self.latencies = array.array("d")
        self.marks = array.array("q")
        #: (number of the request, what it gave), where not what it gave alone
        self.other: list[tuple[int, Results]] = []
        self.wrong = self.raised = self.done = 0
        self.every = 1
        self.account = threading.Lock()
        self.failure: Optional[BaseException] = None

    def answer(self, number: int, arrived: float) -> None:
        number %= len(self.requests)
        _, inputs, expected = self.requests[number]
        result: Optional[Results] = None
        with torch.no_grad(), self.lock:
            try:
                result = self.call(inputs)
            except _REFUSED:
                if expected is not None:
                    raise
        finished = time.perf_counter()
        left_behind = self.router is not None and (
            self.router.call.known or self.router.call.ids is not None
        )
        with self.account:
            self.done += 1
            self.raised += result is None
            self.wrong += left_behind or (result is not None and expected is None)
            if result is not None and expected is not None:
                self.latencies.append(finished - arrived)
                if not equal(result, expected):
                    self.other.append((number, result))
            if self.done % self.every == 0:
                # What waits to be collected is no growth, nor are Python's free lists.
                gc.collect()
                self.marks.extend((self.done, *dataclasses.astuple(held())))

    def answered(self, future: Future) -> None:
        """Keep what a request raised that should not have, to raise it at the end."""
        self.failure = self.failure or future.exception()

    def row(self, model: str, load: str, seconds: float, graphs: int) -> Load:
        if self.failure is not None:
            raise self.failure
        columns = iter(self.marks)
        marks = [(done, Held(*then)) for done, *then in zip(*[columns] * 4)]
        resident, allocated, blocks = growth(marks)
        ended = held()
        unexplained = sum(
            eager_passes(self.model, self.call, self.requests[number][1], result)
            is None
            for number, result in self.other
        )
        return Load(
            model,
            load,
            self.done,
            self.raised,
            len(self.other) - unexplained,
            self.wrong + unexplained,
            *percentiles(self.latencies),
            len(self.latencies) / seconds,
            graphs,
            ended.resident / 2**20,
            resident.per_1000 / 2**20,
            resident.error / 2**20,
            allocated.per_1000 / 2**20,
            allocated.error / 2**20,
            blocks.per_1000,
            blocks.error,
        )


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Graphs that are compiled inside, as the one element of a list afterwards."""
    before = counters["stats"]["unique_graphs"]
    found: list[int] = []
    yield found
    found.append(counters["stats"]["unique_graphs"] - before)


def closed(server: Server, calls: int, threads: int) -> tuple[float, int]:
    """As many at once as there are threads, each of them at once after the last.

    Returns:
        Seconds it took, and graphs that were compiled.
    """
    server.every = max(1, calls // 100)
    numbers = iter(range(calls))

    def work() -> None:
        for number in numbers:
            server.answer(number, time.perf_counter())

    with counted() as graphs, ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
        seconds = time.perf_counter() - started
    return seconds, graphs[0]


def arriving(
    server: Server, requests: int, threads: int, per_second: float, seed: int
) -> tuple[float, int]:
    """Requests at random times, answered by the next free thread.

    Returns:
        As for :func:`closed`.
    """
    server.every = max(1, requests // 100)
    draw = random.Random(seed)
    with counted() as graphs, ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        due = started
        for i in range(requests):
            due += draw.expovariate(per_second)
            time.sleep(max(0.0, due - time.perf_counter()))
            future = pool.submit(server.answer, i, due)
            future.add_done_callback(server.answered)
        pool.shutdown()
        seconds = time.perf_counter() - started
    return seconds, graphs[0]


def measure(
    model: Any, name: str, calls: int, generated: int, threads: int, seed: int = 0
) -> list[Load]:
    """All loads, on a model whose language model gets compiled here.

    Raises:
        RuntimeError: a prompt that should be answered raised when it was made alone,
            or the other way round.
    """
    model.get_decoder().compile(dynamic=True)

    def forward(inputs: Inputs) -> Results:
        return [model(**inputs, use_cache=False).logits]

    def generate(inputs: Inputs) -> Results:
        out = model.generate(
            **inputs,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return [*out.logits, out.sequences]

    def alone(call: Call, inputs: Inputs) -> Optional[Results]:
        try:
            return made_alone(model, call, inputs)
        except _REFUSED:
            return None

    made = prompts(24)
    for _ in range(2):  # The first pass compiles.
        forwards = [(k, i, alone(forward, i)) for k, i in made]
        started = time.perf_counter()
        generations = [(k, i, alone(generate, i)) for k, i in made]
        served = len(generations) / (time.perf_counter() - started)
    for kind, _, expected in forwards + generations:
        if (expected is None) != (kind == "broken"):
            raise RuntimeError(f"a call of kind {kind!r} did not go as it should.")

    rows = []
    # What is there for good would make each collection take a second.
    gc.collect()
    gc.freeze()

    def add(server: Server, load: str, took: tuple[float, int]) -> None:
        rows.append(server.row(name, load, *took))
        print(rows[-1], flush=True)

    for locked in (True, False):
        lock: Any = threading.Lock() if locked else contextlib.nullcontext()
        mode = "with a lock" if locked else "no lock"
        closed(Server(model, forward, forwards, lock), max(20, calls // 20), threads)
        server = Server(model, forward, forwards, lock)
        add(server, f"{threads} threads, {mode}", closed(server, calls, threads))
        server = Server(model, generate, generations, lock)
        took = arriving(server, generated, threads, served * _UTILISATION, seed)
        add(server, f"generate(), arrivals, {mode}", took)
    return rows


def measured(name: str, calls: int, generated: int, threads: int) -> list[Load]:
    """All loads of one model, for a process of its own."""
    model = digits.load_model("outliers")
    if name != "dense":
        prepare()
        recipe = calibrate(model, digits.calibration_samples(16), scheme=name)
        quantize_(model, masquant_config(recipe))
    return measure(model, name, calls, generated, threads)


def main(arguments: Optional[list[str]] = None) -> list[Load]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=SCHEMES, default="w4a8")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--generated", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)

    load_before = os.getloadavg()[0]
    rows = []
    for name in ("dense", options.scheme):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            sizes = options.calls, options.generated, options.threads
            rows += process.submit(measured, name, *sizes).result()

    table = Table(box=box.SIMPLE_HEAD)
    for field in dataclasses.fields(Load):
        table.add_column(field.name)
    for row in rows:
        table.add_row(
            *(
                f"{value:.2f}" if isinstance(value, float) else str(value)
                for value in dataclasses.astuple(row)
            )
        )
    Console(width=240).print(table)
    if options.json is not None:
        report = {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "new_tokens": _NEW_TOKENS,
            "loads": [dataclasses.asdict(row) for row in rows],
        }
        write_whole(options.json, json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
