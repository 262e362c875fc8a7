# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized model under the load of a server.

    python benchmarks/serving_load.py [--calls N] [--threads N] [--json PATH]

One model, its decoder layers compiled, is called

- by threads at once: prompts of text, images, sounds and both, of several lengths, and
  calls that raise half way, which must leave nothing behind;
- by ``generate()``, for requests that arrive at random times (exponential intervals,
  at a rate of 0.7 of what one thread was seen to serve).

Every result is compared with that of the same call made alone. Memory is the process's
resident set, looked at after every hundredth of the calls; its growth is the slope of a
line through the second half. Latencies count from a request's arrival.

Dynamo may compile again where threads take turns between the graphs of one layer; in
the rows with a lock, one call runs at a time.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

from torchao_masquant import SCHEMES, Router, calibrate, masquant_config
from torchao_masquant.replacing import replacing
from torchao_masquant.testing import digits

_NEW_TOKENS = 4
_UTILISATION = 0.7
_KINDS = ("text", "image", "audio", "both")
# Of the largest logit. The same graph gives the same numbers; the model as it is without
# graphs, which a layer falls back to where Dynamo compiles no more of them, was seen to
# be 8e-4 away; and one modality's tokens taken for another's, 3e-2 at least.
_SAME, _NEAR = 1e-4, 1e-2


@dataclass
class Load:
    """What a load did.

    Attributes:
        load: its name.
        requests: answered or refused.
        raised: refused, as they should be.
        near: results of another rounding than those of the call made alone: of a layer
            that ran without its graph.
        wrong: all other results that are not those of the call made alone.
        p50_ms: half of the answers took no longer; so on for ``p90_ms``, ``p99_ms``.
        per_second: answers.
        graphs: compiled while it ran.
        resident_mib: at its end.
        growth_mib_per_1000: of resident memory.
    """

    load: str
    requests: int
    raised: int
    near: int
    wrong: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_second: float
    graphs: int
    resident_mib: float
    growth_mib_per_1000: float


Inputs = dict[str, torch.Tensor]
#: (name of the kind, inputs, what the call made alone gave; None: it raised)
Request = tuple[str, Inputs, Optional[torch.Tensor]]


def resident_bytes() -> int:
    """The process's resident set (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


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


def percentiles(latencies: list[float]) -> list[float]:
    return [float(v) * 1e3 for v in np.percentile(latencies, (50, 90, 99))]


class Server:
    """Answers requests on threads, and keeps account."""

    def __init__(
        self,
        router: Router,
        call: Callable[[Inputs], torch.Tensor],
        requests: list[Request],
        lock: contextlib.AbstractContextManager,
    ):
        self.router = router
        self.call = call
        self.requests = requests
        self.lock = lock
        self.latencies: list[float] = []
        self.resident: list[tuple[int, int]] = []
        self.wrong = self.near = self.raised = self.done = 0
        self.every = 1
        self.account = threading.Lock()

    def answer(self, index: int, arrived: float) -> None:
        kind, inputs, expected = self.requests[index % len(self.requests)]
        result: Optional[torch.Tensor] = None
        with torch.no_grad(), self.lock:
            try:
                result = self.call(inputs)
            except (ValueError, RuntimeError):
                if expected is not None:
                    raise
        finished = time.perf_counter()
        left_behind = self.router.call.known or self.router.call.ids is not None
        with self.account:
            self.done += 1
            if result is None or expected is None:
                self.raised += result is None
                self.wrong += result is not None or left_behind
            else:
                self.latencies.append(finished - arrived)
                within = same(result, expected)
                self.near += not within and same(result, expected, _NEAR)
                self.wrong += left_behind or not same(result, expected, _NEAR)
            if self.done % self.every == 0:
                self.resident.append((self.done, resident_bytes()))

    def row(self, name: str, seconds: float, graphs: int) -> Load:
        late = self.resident[len(self.resident) // 2 :]
        slope = np.polyfit(*zip(*late), 1)[0] if len(late) > 1 else float("nan")
        return Load(
            name,
            self.done,
            self.raised,
            self.near,
            self.wrong,
            *percentiles(self.latencies),
            len(self.latencies) / seconds,
            graphs,
            resident_bytes() / 2**20,
            float(slope) * 1000 / 2**20,
        )


def same(
    result: torch.Tensor, expected: torch.Tensor, tolerance: float = _SAME
) -> bool:
    """Logits within a tolerance of the largest, or equal tokens."""
    if not result.is_floating_point():
        return torch.equal(result, expected)
    bound = tolerance * expected.abs().max()
    return bool(((result - expected).abs() <= bound).all())


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Graphs that are compiled inside, as the one element of a list afterwards."""
    before = counters["stats"]["unique_graphs"]
    found: list[int] = []
    yield found
    found.append(counters["stats"]["unique_graphs"] - before)


def closed(server: Server, name: str, calls: int, threads: int) -> Load:
    """As many at once as there are threads, each of them at once after the last."""
    server.every = max(1, calls // 100)
    with counted() as graphs, ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        futures = [
            pool.submit(lambda i=i: server.answer(i, time.perf_counter()))
            for i in range(calls)
        ]
        for future in futures:
            future.result()
        seconds = time.perf_counter() - started
    return server.row(name, seconds, graphs[0])


def arriving(
    server: Server, name: str, requests: int, threads: int, per_second: float, seed: int
) -> Load:
    """Requests at random times, answered by the next free thread."""
    server.every = max(1, requests // 100)
    draw = random.Random(seed)
    with counted() as graphs, ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        due, futures = started, []
        for i in range(requests):
            due += draw.expovariate(per_second)
            time.sleep(max(0.0, due - time.perf_counter()))
            futures.append(pool.submit(server.answer, i, due))
        for future in futures:
            future.result()
        seconds = time.perf_counter() - started
    return server.row(name, seconds, graphs[0])


def alone(call: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> Any:
    with torch.no_grad():
        try:
            return call(inputs)
        except (ValueError, RuntimeError):
            return None


def measure(
    model: Any, calls: int, generated: int, threads: int, seed: int = 0
) -> list[Load]:
    """All loads, on a quantized model whose layers get compiled here.

    Raises:
        RuntimeError: a prompt that should be answered raised when it was made alone,
            or the other way round.
    """
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)

    def forward(inputs: Inputs) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    def generate(inputs: Inputs) -> torch.Tensor:
        return model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)

    router = model.forward.router
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
    for locked in (True, False):
        lock: Any = threading.Lock() if locked else contextlib.nullcontext()
        mode = "with a lock" if locked else "no lock"
        warm = Server(router, forward, forwards, lock)
        closed(warm, "warm-up", max(20, calls // 20), threads)
        server = Server(router, forward, forwards, lock)
        rows.append(closed(server, f"{threads} threads, {mode}", calls, threads))
        server = Server(router, generate, generations, lock)
        rows.append(
            arriving(
                server,
                f"generate(), arrivals, {mode}",
                generated,
                threads,
                served * _UTILISATION,
                seed,
            )
        )
    return rows


def main(arguments: Optional[list[str]] = None) -> list[Load]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=SCHEMES, default="w4a8")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--generated", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)

    model = digits.load_model("outliers")
    recipe = calibrate(model, digits.calibration_samples(16), scheme=options.scheme)
    quantize_(model, masquant_config(recipe))
    rows = measure(model, options.calls, options.generated, options.threads)

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
    Console(width=160).print(table)
    if options.json is not None:
        report = [dataclasses.asdict(row) for row in rows]
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
