# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One linear on the CPU: MASQuant beside high precision and torchao's integers.

    python benchmarks/cpu_linear.py [--quick] [--threads 2] [--json PATH]

Every candidate of a shape and number of tokens runs in one process, in turn, over and
over, and the median counts: what disturbs one disturbs all. A ratio above 1 says that
MASQuant is faster. The ways of high precision are a bf16 linear eager, compiled and
compiled with frozen weights, and a float32 linear eager and frozen, as some processors
are faster at that: "bf16" stands for the fastest of bf16, "high" for the fastest of all
five. Every other candidate is compiled. Weights are random; rank is 5 % of min(N, K),
of one modality beside text.
"""

import argparse
import copy
import dataclasses
import gc
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from torchao_masquant import SCHEMES
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.tensor_subclasses import MASQuantTensor

Shape = tuple[int, int]
Call = Callable[[], torch.Tensor]

SHAPES: list[Shape] = [
    (2048, 11008),
    (11008, 2048),
    (2048, 2048),
    (3584, 18944),
    (3584, 3584),
]
TOKENS = [1, 16, 256, 1024]
QUICK_SHAPES: list[Shape] = [(2048, 2048)]
QUICK_TOKENS = [1, 256]
SCHEME_NAMES = ["w8a8", "w4a8", "w4a16"]
MIXES = {"base": 0.0, "half vision": 0.5, "all vision": 1.0}
RANK = 0.05
BF16 = ["bf16 eager", "bf16 compiled", "bf16 frozen"]
HIGH = [*BF16, "fp32 eager", "fp32 frozen"]
TORCHAO = [
    "torchao int8 dynamic",
    "torchao SmoothQuant",
    "torchao int8 weight-only",
    "torchao int4 weight-only",
]


@dataclass
class Row:
    """One candidate of one shape and number of tokens.

    Attributes:
        in_features: K.
        out_features: N.
        tokens: M.
        candidate: its name.
        milliseconds: median.
        repeats: of which it is the median.
        kernel: of MASQuant's product, in words; else None.
    """

    in_features: int
    out_features: int
    tokens: int
    candidate: str
    milliseconds: float
    repeats: int
    kernel: Optional[str] = None


def processor() -> str:
    """The model's name and what it has for integers."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    known = ["avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"]
    return f"{name} ({', '.join(f for f in known if f in flags) or 'no vectors known'})"


def write_report(path: Path, threads: int, load: float, **found: Any) -> None:
    """Write what was found, after what it was found on.

    Args:
        load: average of the machine.
    """
    machine = {
        "processor": processor(),
        "threads": threads,
        "torch": torch.__version__,
        "load": load,
    }
    write_whole(path, json.dumps({**machine, **found}, indent=1) + "\n")


def masquant_weight(weight: torch.Tensor, scheme_name: str) -> MASQuantTensor:
    """A weight of two modalities with random smoothing factors and a random pair.

    Args:
        weight: (N, K).
        scheme_name: of its integers.
    """
    scheme = SCHEMES[scheme_name]
    n, k = weight.shape
    rank = max(1, round(RANK * min(n, k)))
    return MASQuantTensor.from_hp(
        weight,
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        modalities=("text", "vision"),
        smoothing_factor=torch.rand(2, k) + 0.5,
        ranks=(rank,),
        l1=torch.randn(k, rank) / k**0.5,
        l2=torch.randn(rank, n) / rank**0.5,
        modality_bias=torch.randn(2, n),
    )


def _frozen(module: nn.Module) -> Callable[..., torch.Tensor]:
    return torch.compile(module, options={"freezing": True})


def _torchao(linear: nn.Linear) -> dict[str, nn.Module]:
    """Torchao's own, not yet compiled."""

    def quantized(*configs: object) -> nn.Module:
        model = nn.Sequential(copy.deepcopy(linear))
        for config in configs:
            quantize_(model, config)
            if isinstance(config, SmoothQuantConfig) and config.step == "prepare":
                model(torch.randn(8, linear.in_features, dtype=linear.weight.dtype))
        return model

    int8 = Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    return dict(
        zip(
            TORCHAO,
            (
                quantized(int8),
                quantized(
                    SmoothQuantConfig(int8, step="prepare"),
                    SmoothQuantConfig(int8, step="convert"),
                ),
                quantized(Int8WeightOnlyConfig(version=2, set_inductor_config=False)),
                quantized(PrototypeInt4WeightOnlyConfig(set_inductor_config=False)),
            ),
        )
    )


def candidates(shape: Shape) -> Callable[[int], dict[str, Call]]:
    """All candidates of one shape; a function of the number of tokens."""
    k, n = shape
    linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    wide = copy.deepcopy(linear).float()
    torchao = _torchao(linear)
    weights = {s: masquant_weight(linear.weight.data, s) for s in SCHEME_NAMES}

    def masquant(weight: MASQuantTensor) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
            return torch.ops.masquant.linear(x, weight, ids)

        return torch.compile(call, fullgraph=True)

    def bound(call: Callable[..., torch.Tensor], *args: Optional[torch.Tensor]) -> Call:
        return lambda: call(*args)

    def of(tokens: int) -> dict[str, Call]:
        # All are compiled for this number of tokens alone.
        torch._dynamo.reset()
        functions: dict[str, Callable[..., torch.Tensor]] = {
            "bf16 eager": linear,
            "bf16 compiled": torch.compile(linear),
            "bf16 frozen": _frozen(linear),
            "fp32 eager": wide,
            "fp32 frozen": _frozen(wide),
            **{name: torch.compile(module) for name, module in torchao.items()},
        }
        x = torch.randn(tokens, k, dtype=torch.bfloat16)
        calls = {
            name: bound(function, x.float() if name in HIGH[3:] else x)
            for name, function in functions.items()
        }
        for scheme, weight in weights.items():
            function = masquant(weight)
            for mix, share in MIXES.items():
                if tokens == 1 and mix == "half vision":
                    continue
                ids = torch.zeros(tokens, dtype=torch.int64)
                ids[: round(share * tokens)] = 1
                calls[f"{scheme} {mix}"] = bound(function, x, ids if share else None)
        return calls

    return of


def measure(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Interleaved timings, in seconds.

    Args:
        calls: warmed up here.
        seconds: that all of them may take together; each runs at least five times.
    """
    started = time.perf_counter()
    for call in calls.values():
        call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    once = time.perf_counter() - started
    repeats = max(5, min(100, int(seconds / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return taken


def run(shapes: list[Shape], tokens: list[int], seconds: float) -> list[Row]:
    """Measure all candidates of all shapes and numbers of tokens."""
    rows = []
    for shape in shapes:
        of = candidates(shape)
        for count in tokens:
            print(f"K={shape[0]} N={shape[1]} M={count} ...", file=sys.stderr)
            for name, taken in measure(of(count), seconds).items():
                scheme = SCHEMES.get(name.partition(" ")[0])
                kernel = None
                if scheme is not None:
                    width = scheme.group_size
                    kernel = cpu_lowering.kernel_of(
                        weight_bits=scheme.weight_bits,
                        act_bits=scheme.act_bits,
                        tokens=count,
                        in_features=shape[0],
                        groups=1 if width is None else shape[0] // width,
                    )
                median = 1e3 * statistics.median(taken)
                rows.append(Row(*shape, count, name, median, len(taken), kernel))
        gc.collect()
    return rows


def ratios(rows: list[Row]) -> list[dict[str, Union[str, int, float]]]:
    """How many times faster than each reference MASQuant is."""
    places: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        place = (row.in_features, row.out_features, row.tokens)
        places.setdefault(place, {})[row.candidate] = row.milliseconds
    found = []
    for (k, n, tokens), taken in places.items():
        references = {
            "bf16": min(taken[name] for name in BF16),
            "high": min(taken[name] for name in HIGH),
            **{name: taken[name] for name in TORCHAO},
        }
        for name, milliseconds in taken.items():
            if name.partition(" ")[0] not in SCHEME_NAMES:
                continue
            entry: dict[str, Union[str, int, float]] = {
                "in_features": k,
                "out_features": n,
                "tokens": tokens,
                "candidate": name,
            }
            for reference, theirs in references.items():
                entry[f"over {reference}"] = round(theirs / milliseconds, 3)
            found.append(entry)
    return found


@torch.no_grad()
def main(arguments: Optional[list[str]] = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of each shape and length")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    tokens = QUICK_TOKENS if options.quick else TOKENS
    seconds = options.seconds or (3 if options.quick else 10)
    rows = run(shapes, tokens, seconds)

    found = ratios(rows)
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{processor()}, {options.threads} threads"
    )
    for column in found[0]:
        numeric = column.startswith("over") or column == "tokens"
        table.add_column(column, justify="right" if numeric else "left")
    for entry in found:
        table.add_row(*(str(value) for value in entry.values()))
    Console(width=200).print(table)
    if options.json is not None:
        write_report(
            options.json,
            options.threads,
            os.getloadavg()[0],
            engine=cpu_lowering.engine().engine.value,
            ratios=found,
            rows=[dataclasses.asdict(row) for row in rows],
        )
    return rows


if __name__ == "__main__":
    main()
