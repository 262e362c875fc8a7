# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""An MLP of a 3B model on the CPU at 1 to 1024 tokens, beside OpenVINO or dense linears.

    python benchmarks/cpu_few_tokens.py [--openvino PYTHON] [--dense] [--vnni] [--json PATH]

``PYTHON`` is that of an environment with openvino and numpy. Each candidate has several
MLPs (2048 to 11008, gate, up and down), run one after the other, so that weights come
from memory; candidates take turns, and the median counts. Beside a time of few tokens
are the gigabytes of weights a second. bfloat16 tokens for ours, float32 for OpenVINO,
which quantizes them as ours do, but for "w4a16" and "bfloat16". ``--vnni`` has ours also
without AMX. As on a processor with AVX2 alone:

    MASQUANT_CPU_ENGINE=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_few_tokens.py --dense

On a busy machine, ``--processor-time`` counts that of one thread, or of OpenVINO's process.
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
from torchao_masquant.kernels.cpu_engine import CpuEngine

K, N = 2048, 11008
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
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
    "OpenVINO bfloat16": ("bfloat16", 16),
}

#: of linears that are not quantized; packed: by oneDNN ahead of time, as frozen weights are
DENSE = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, packed": (torch.bfloat16, True),
}
WITHOUT_AMX = ", without AMX"

Timed = Callable[[int], float]
Clock = Callable[[], float]


def ours(name: str, copies: int, clock: Clock, tiles: bool = False) -> Timed:
    """Seconds of one MLP of so many tokens.

    Args:
        name: of ``OURS``.
        copies: MLPs.
        clock: of the seconds.
        tiles: whether AMX, where it is the engine, is used.
    """
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

    amx = cpu_lowering.engine().engine is CpuEngine.AMX

    def run(tokens: int) -> float:
        x = torch.randn(tokens, K).bfloat16()
        if amx:
            torch.ops.masquant_cpu.use_tiles(tiles)
        started = clock()
        for gate, up, down in layers:
            first, second = together(x, gate, up)
            together(torch.nn.functional.silu(first) * second, down)
        return (clock() - started) / copies

    return run


def dense(dtype: torch.dtype, packed: bool, copies: int, clock: Clock) -> Timed:
    """The same of linears that are not quantized."""
    shapes = ((N, K), (N, K), (K, N))
    layers = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(copies)]
    linear: Callable[..., torch.Tensor] = torch.nn.functional.linear
    if packed:
        onednn = torch.ops.mkldnn
        layers = [
            [onednn._reorder_linear_weight(w, None) for w in layer] for layer in layers
        ]

        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return onednn._linear_pointwise(x, weight, None, "none", [], "")

    def run(tokens: int) -> float:
        x = torch.randn(tokens, K).to(dtype)
        started = clock()
        for gate, up, down in layers:
            linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)
        return (clock() - started) / copies

    return run


def openvino(
    worker: subprocess.Popen, form: str, copies: int, threads: int, clock: str
) -> Timed:
    """The same of the worker's, by a clock of ``time``."""
    assert worker.stdin is not None and worker.stdout is not None
    asked, answered = worker.stdin, worker.stdout

    def run(tokens: int) -> float:
        request = [form, K, N, copies, tokens, threads, clock]
        asked.write(json.dumps(request) + "\n")
        asked.flush()
        line = answered.readline()
        if not line:
            raise RuntimeError("OpenVINO's process has ended, see what it wrote above.")
        return float(line)

    return run


def run(
    python: Optional[str],
    with_dense: bool,
    with_vnni: bool,
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
    candidates = {name: ours(name, copies, clock, tiles=True) for name in OURS}
    if with_vnni:
        for name in OURS:
            candidates[name + WITHOUT_AMX] = ours(name, copies, clock)
    # Two of them outgrow the caches.
    few = min(copies, 2)
    if with_dense:
        for name, (dtype, packed) in DENSE.items():
            if not packed or torch.backends.mkldnn.is_available():
                candidates[name] = dense(dtype, packed, few, clock)
    if python is not None:
        worker = subprocess.Popen(
            [python, Path(__file__).parent / "openvino_bench" / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (form, _) in OPENVINO.items():
            count = few if form == "bfloat16" else copies
            theirs = "process_time" if clock is time.thread_time else "perf_counter"
            candidates[name] = openvino(worker, form, count, threads, theirs)
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
        bits = 8 * DENSE[name][0].itemsize
    else:
        name = name.removesuffix(WITHOUT_AMX)
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
    parser.add_argument("--vnni", action="store_true", help="also ours without AMX")
    parser.add_argument("--quick", action="store_true", help="one and 17 tokens, once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread, whatever else runs",
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--copies", type=int, default=6, help="MLPs of each")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    clock: Clock = time.perf_counter
    if options.processor_time:
        options.threads, clock = 1, time.thread_time
    repeats, tokens, copies = options.repeats, TOKENS, options.copies
    if options.quick:
        repeats, tokens, copies = 1, (1, 17), 1
    load = os.getloadavg()[0]
    threads = options.threads
    found = run(
        *(options.openvino, options.dense, options.vnni),
        *(threads, repeats, tokens, copies, clock),
    )
    engine = cpu_lowering.engine().engine.value
    title = f"{processor()}, {threads} threads, engine {engine}"
    _print(found, title)
    if options.json is not None:
        rates = {
            name: {count: gigabytes(name, s) for count, s in times.items()}
            for name, times in found.items()
        }
        told = {"engine": engine, "clock": clock.__name__, "copies": copies}
        told["seconds"] = found
        told["GB/s"] = rates
        write_report(options.json, threads, load, **told)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
