# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""An MLP of a 3B model on the CPU at 1 to 256 tokens, beside OpenVINO or dense linears.

    python benchmarks/cpu_few_tokens.py [--openvino PYTHON] [--dense] [--json PATH]

``PYTHON`` is that of an environment with openvino and numpy. Each candidate has several
MLPs (2048 to 11008, gate, up and down), run one after the other, so that weights come
from memory; candidates take turns, and the median counts. Beside a time of few tokens
are the gigabytes of weights a second. bfloat16 tokens for ours, float32 for OpenVINO,
which quantizes them as ours do, but for "w4a16". As on a processor with AVX2 alone:

    MASQUANT_CPU_ENGINE=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_few_tokens.py --dense

On a busy machine, ``--processor-time`` counts that of one thread, OpenVINO's apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from cpu_linear import processor, write_report
from rich import box
from rich.console import Console
from rich.table import Table

from torchao_masquant.kernels import cpu_lowering

K, N = 2048, 11008
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
#: name to bits of weights, of activations, and the width of a group
OURS = {
    "w8a8": (8, 8, None),
    "w4a8": (4, 8, None),
    "w4a8, groups of 128": (4, 8, 128),
    "w4a16, groups of 128": (4, 16, 128),
}
#: name to what its worker calls it, and bits of weights
OPENVINO = {
    "OpenVINO int8": ("int8", 8),
    "OpenVINO int4, groups of 128": ("int4", 4),
}

#: of linears that are not quantized
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Timed = Callable[[int], float]
Clock = Callable[[], float]


def ours(name: str, copies: int, clock: Clock) -> Timed:
    """Seconds of one MLP of so many tokens."""
    bits, act_bits, width = OURS[name]
    ops = torch.ops.masquant

    def weight(n: int, k: int) -> dict[str, Any]:
        stored, dtype = (
            ((n, k), torch.int8) if bits == 8 else ((n, k // 2), torch.uint8)
        )
        groups = 1 if width is None else k // width
        return {
            "factor": torch.ones(1, k),
            "qdata": torch.randint(0, 127, stored, dtype=dtype),
            "scale": torch.rand(n, groups) * 1e-3 + 1e-3,
            "zero": torch.randint(-7, 7, (n, groups), dtype=torch.int8),
        }

    layers = [(weight(N, K), weight(N, K), weight(K, N)) for _ in range(copies)]

    def together(x: torch.Tensor, *weights: dict[str, Any]) -> list[torch.Tensor]:
        if act_bits == 16:
            return [
                ops.weight_only_linear(
                    *(x, w["factor"], w["qdata"], w["scale"], w["zero"]),
                    *([None] * 5),
                    *([], bits, x.dtype),
                )
                for w in weights
            ]
        q = ops.smooth_quantize(x, weights[0]["factor"], None, act_bits)
        return [
            ops.int_linear(*q, w["qdata"], w["scale"], *([None] * 5), bits, x.dtype)
            for w in weights
        ]

    def run(tokens: int) -> float:
        x = torch.randn(tokens, K).bfloat16()
        started = clock()
        for gate, up, down in layers:
            first, second = together(x, gate, up)
            together(torch.nn.functional.silu(first) * second, down)
        return (clock() - started) / copies

    return run


def dense(dtype: torch.dtype, copies: int, clock: Clock) -> Timed:
    """The same of linears that are not quantized."""
    shapes = ((N, K), (N, K), (K, N))
    layers = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(copies)]

    def run(tokens: int) -> float:
        x, linear = torch.randn(tokens, K).to(dtype), torch.nn.functional.linear
        started = clock()
        for gate, up, down in layers:
            linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)
        return (clock() - started) / copies

    return run


def openvino(worker: subprocess.Popen, form: str, copies: int, threads: int) -> Timed:
    """The same of the worker's."""
    assert worker.stdin is not None and worker.stdout is not None
    asked, answered = worker.stdin, worker.stdout

    def run(tokens: int) -> float:
        asked.write(json.dumps([form, K, N, copies, tokens, threads]) + "\n")
        asked.flush()
        line = answered.readline()
        if not line:
            raise RuntimeError("OpenVINO's process has ended, see what it wrote above.")
        return float(line)

    return run


def run(
    python: Optional[str],
    with_dense: bool,
    threads: int,
    repeats: int,
    tokens: tuple[int, ...],
    copies: int,
    clock: Clock,
) -> dict[str, dict[int, float]]:
    """Median seconds of an MLP, by candidate and tokens."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    cpu_lowering.prepare()
    candidates = {name: ours(name, copies, clock) for name in OURS}
    if with_dense:
        # Two of them outgrow the caches.
        for name, dtype in DENSE.items():
            candidates[name] = dense(dtype, min(copies, 2), clock)
    if python is not None:
        worker = subprocess.Popen(
            [python, Path(__file__).parent / "openvino_bench" / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (form, _) in OPENVINO.items():
            candidates[name] = openvino(worker, form, copies, threads)
    found: dict[str, dict[int, float]] = {name: {} for name in candidates}
    for count in tokens:
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        # The first round warms up.
        for _ in range(repeats + 1):
            for name, candidate in candidates.items():
                taken[name].append(candidate(count))
        for name, seconds in taken.items():
            found[name][count] = statistics.median(seconds[1:])
    if python is not None:
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return found


def gigabytes(name: str, seconds: float) -> float:
    """Of weights a second."""
    if name in DENSE:
        bits = 8 * DENSE[name].itemsize
    else:
        bits = OURS[name][0] if name in OURS else OPENVINO[name][1]
    return 3 * K * N * bits / 8 / 1e9 / seconds


def _print(found: dict[str, dict[int, float]], title: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("ms (GB/s)")
    for count in next(iter(found.values())):
        table.add_column(f"{count} tokens", justify="right")
    for name, times in found.items():
        cells = [f"{1e3 * s:.2f} ({gigabytes(name, s):.0f})" for s in times.values()]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def main(arguments: Optional[list[str]] = None) -> dict[str, dict[int, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openvino", metavar="PYTHON", help="with openvino and numpy")
    parser.add_argument("--dense", action="store_true", help="also linears of floats")
    parser.add_argument("--quick", action="store_true", help="one and 17 tokens, once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread, whatever else runs",
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    clock: Clock = time.perf_counter
    if options.processor_time:
        options.threads, clock = 1, time.thread_time
    repeats, tokens, copies = options.repeats, TOKENS, 6
    if options.quick:
        repeats, tokens, copies = 1, (1, 17), 1
    load = os.getloadavg()[0]
    threads = options.threads
    found = run(
        options.openvino, options.dense, threads, repeats, tokens, copies, clock
    )
    engine = cpu_lowering.engine().engine.value
    title = f"{processor()}, {threads} threads, engine {engine}"
    _print(found, title)
    if options.json is not None:
        rates = {
            name: {count: gigabytes(name, s) for count, s in times.items()}
            for name, times in found.items()
        }
        told = {"engine": engine, "clock": clock.__name__, "seconds": found}
        told["GB/s"] = rates
        write_report(options.json, threads, load, **told)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
