# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A layer of 128 experts on the CPU: all of them in one call, beside one after the other.

    python benchmarks/cpu_experts.py [--threads 2] [--json PATH]

The widths are those of Qwen3-VL-30B-A3B: 2048 to 2 x 768 and back, 8 experts a token,
chosen at random. Each scheme has two layers, run one after the other, so that weights
come from memory; the two ways take turns, and the median counts. Beside a time are the
gigabytes a second of the weights of experts that have tokens.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import torch
from cpu_linear import processor, write_report
from rich import box
from rich.console import Console
from rich.table import Table

from torchao_masquant.kernels import cpu_lowering, expert_operators

TOKENS = (1, 8, 64, 512)
#: name to bits of weights, all with activations of 8
SCHEMES = {"w8a8": 8, "w4a8": 4}
#: name to what multiplies
WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "one call": torch.ops.masquant.expert_int_linear,
    "one after the other": expert_operators.expert_int_linear,
}


class Sizes(NamedTuple):
    """Of a layer: experts, of which a token has top_k, and widths."""

    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    inner: int = 768


def weight(bits: int, *shape: int) -> tuple[torch.Tensor, ...]:
    """Factors (1, K), integers (E, N, K), packed where they are of 4 bits, and scales."""
    *rows, k = shape
    if bits == 4:
        qdata = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8)
    else:
        qdata = torch.randint(-127, 128, shape, dtype=torch.int8)
    return torch.ones(1, k), qdata, torch.rand(*rows, 1) * 1e-3 + 1e-3


def layer(
    x: torch.Tensor,
    routed: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[Any, Any],
    bits: int,
    multiply: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """(S, H) of tokens (T, H): each expert's outputs, not yet added up."""
    rows, ends = routed

    def project(x: torch.Tensor, rows: Any, weight: Any) -> torch.Tensor:
        factor, *weight = weight
        q = torch.ops.masquant.smooth_quantize(x, factor, None, 8)
        if rows is not None:
            q = [t.index_select(0, rows) for t in q]
        return multiply(*q, ends, *weight, *([None] * 5), [], bits, x.dtype)

    gate, up = project(x, rows, weights[0]).chunk(2, -1)
    return project(torch.nn.functional.silu(gate) * up, None, weights[1])


def routing(tokens: int, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token each row is of, and where each expert's rows end."""
    chosen = torch.rand(tokens, sizes.experts).topk(sizes.top_k).indices.reshape(-1)
    sorted_, order = torch.sort(chosen, stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(sizes.experts), right=True)
    return order // sizes.top_k, ends


def run(
    threads: int, repeats: int, tokens: tuple[int, ...], sizes: Sizes
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Median seconds of a layer, and GB/s, by scheme and way, and tokens."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    cpu_lowering.prepare()
    seconds: dict[str, dict[int, float]] = {}
    rates: dict[str, dict[int, float]] = {}
    experts, _, hidden, inner = sizes
    for scheme, bits in SCHEMES.items():
        layers = [
            (
                weight(bits, experts, 2 * inner, hidden),
                weight(bits, experts, hidden, inner),
            )
            for _ in range(2)
        ]
        for count in tokens:
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            read: list[float] = []
            # The first round warms up.
            for _ in range(repeats + 1):
                x = torch.randn(count, hidden).bfloat16()
                routed = routing(count, sizes)
                active = int((routed[1].diff(prepend=torch.zeros(1)) > 0).sum())
                read.append(active * 3 * hidden * inner * bits / 8 / 1e9)
                for way, multiply in WAYS.items():
                    started = time.perf_counter()
                    for weights in layers:
                        layer(x, routed, weights, bits, multiply)
                    taken[way].append((time.perf_counter() - started) / len(layers))
            for way, times in taken.items():
                name = f"{scheme}, {way}"
                median = statistics.median(times[1:])
                seconds.setdefault(name, {})[count] = median
                rates.setdefault(name, {})[count] = statistics.median(read) / median
    return seconds, rates


def _print(seconds: Any, rates: Any, title: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("ms (GB/s)")
    for count in next(iter(seconds.values())):
        table.add_column(f"{count} tokens", justify="right")
    for name, times in seconds.items():
        cells = (f"{1e3 * s:.2f} ({rates[name][c]:.0f})" for c, s in times.items())
        table.add_row(name, *cells)
    Console(width=140).print(table)


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, two sizes, once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    repeats, tokens, sizes = options.repeats, TOKENS, Sizes()
    if options.quick:
        repeats, tokens, sizes = 1, (1, 17), Sizes(4, 2, 64, 32)
    load = os.getloadavg()[0]
    seconds, rates = run(options.threads, repeats, tokens, sizes)
    _print(seconds, rates, f"{processor()}, {options.threads} threads, load {load:.1f}")
    if options.json is not None:
        told = {"seconds": seconds, "GB/s": rates}
        write_report(options.json, options.threads, load, **told)


if __name__ == "__main__":
    main(sys.argv[1:])
