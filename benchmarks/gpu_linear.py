# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears on a GPU: MASQuant beside bf16 and torchao's integers.

    python benchmarks/gpu_linear.py [--seconds 440] [--json PATH] [--dry-run]

At every place (a shape of Qwen2.5-VL or Qwen2.5-Omni and a number of tokens) all
candidates run in turn, over and over, and the medians count: what disturbs one disturbs
all. A ratio above 1 says that MASQuant is faster. Each is timed twice: in a CUDA graph,
which is the kernels alone, and called from Python, which is what eager decoding sees.
Calls take copies of the weight in turn, so that none is still in the cache. bf16 is
cuBLAS, torchao's are compiled with max-autotune, ours run as a user's do:
``torch.ops.masquant.linear`` with a ``MASQuantTensor`` under ``torch.compile``. Results
are checked in the same run. q/k/v and gate/up are also measured together, where ours
smooth their input once, beside bf16 one by one and as one product ("fused"). Weights are
random; the rank is 5 % of min(N, K), of one
modality beside text. What the time does not suffice for is skipped, and named.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional, Protocol, Sequence

import torch
from gpu_bench.candidates import Bench, Built
from gpu_bench.plan import GROUPS, SHAPES, TOKENS, Step, card_named, plan, works
from gpu_bench.roofline import DEVICES, Device
from gpu_bench.targets import Row, Target, ratios, targets
from gpu_bench.timing import Timing, measure
from rich import box
from rich.console import Console
from rich.table import Table

from torchao_masquant.atomic_files import replacing

# Seconds of a step for its timings alone, and for all of a step of a kind not yet seen.
_MEASURING = 0.5
_UNSEEN = 45.0

Measure = Callable[
    [dict[str, Sequence[Callable[[], object]]], float], dict[str, Timing]
]


class Builder(Protocol):
    """Builds candidates of one place, as :class:`Bench` does."""

    def build(self, candidate: str) -> Built: ...


@dataclasses.dataclass
class Results:
    """Of a run.

    Attributes:
        rows: what was measured.
        failed: what raised, in words.
        skipped: what there was no time for, in words.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def run(
    steps: list[Step],
    builder: Callable[[Step], Builder],
    timer: Measure,
    card: Optional[Device],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    *,
    unseen: float = _UNSEEN,
    tell: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Build, check and measure step after step while there is time.

    Args:
        steps: in the order of what they tell.
        builder: of the candidates of a step.
        timer: as :func:`measure`.
        card: for the roofline.
        seconds: for all of it. No step begins that might not end in time, going by the
            longest so far with as many candidates.
        clock: seconds since any moment.
        unseen: seconds that a step may take while none with as many candidates was seen.
        tell: called with what there is after each step.
    """
    results = Results()
    started = clock()
    longest: dict[int, float] = {}
    for number, step in enumerate(steps):
        begun = clock()
        name = f"{_where(step)}: {', '.join(step.candidates)}"
        if begun - started + longest.get(len(step.candidates), unseen) > seconds:
            results.skipped.append(name)
            continue
        print(f"{number + 1}/{len(steps)} {_where(step)} ...", file=sys.stderr)
        _measure_step(results, number, step, builder(step), timer, card)
        taken = clock() - begun
        count = len(step.candidates)
        longest[count] = max(longest.get(count, 0.0), taken)
        tell(results)
    return results


def _where(step: Step) -> str:
    place = step.place
    sizes = "+".join(map(str, place.sizes))
    return f"K={place.in_features} N={sizes} M={place.tokens}"


def _measure_step(
    results: Results,
    number: int,
    step: Step,
    builder: Builder,
    timer: Measure,
    card: Optional[Device],
) -> None:
    built: dict[str, Built] = {}
    for candidate in step.candidates:
        try:
            built[candidate] = builder.build(candidate)
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            results.failed.append(
                f"{_where(step)}: {candidate}: {type(error).__name__}: {first}"
            )
    if not built:
        return
    timings = timer({name: b.calls for name, b in built.items()}, _MEASURING)
    place = step.place
    for name, timing in timings.items():
        least = None
        if card is not None:
            least = 1e6 * sum(work.seconds(card) for work in works(place, name))
        results.rows.append(
            Row(
                number,
                place.linear,
                place.in_features,
                place.out_features,
                place.tokens,
                name,
                timing.graph,
                timing.eager,
                timing.rounds,
                least,
                built[name].error,
                not built[name].error <= built[name].bound,
            )
        )


def rows_table(rows: list[Row]) -> Table:
    """A line each; ratios are over what ran in the same step."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("linear", "K", "N", "M", "candidate"):
        table.add_column(column, justify="right" if len(column) == 1 else "left")
    for column in ("us, graph", "us, eager", "us, paper", "of paper", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        known = row.paper is not None and row.of_paper is not None
        table.add_row(
            row.linear,
            *map(str, (row.in_features, row.out_features, row.tokens)),
            row.candidate,
            f"{row.graph:.1f}",
            f"{row.eager:.1f}",
            f"{row.paper:.1f}" if known else "",
            f"{row.of_paper:.0%}" if known else "",
            f"{row.error:.1e}{' WRONG' if row.wrong else ''}",
        )
    return table


def ratios_table(found: list[dict[str, object]]) -> Table:
    """How many times faster each of ours is."""
    table = Table(box=box.SIMPLE_HEAD)
    columns: list[str] = list(dict.fromkeys(key for entry in found for key in entry))
    for column in columns:
        table.add_column(column, justify="right" if "over" in column else "left")
    for entry in found:
        table.add_row(*(str(entry.get(column, "")) for column in columns))
    return table


def targets_table(found: list[Target]) -> Table:
    """Which ratios were to be reached, and which are."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("target", "least", "worst", "where", "places met", "verdict"):
        table.add_column(column)
    for target in found:
        table.add_row(
            target.name,
            f"{target.least:.2f}",
            "" if target.worst is None else f"{target.worst:.2f}",
            target.where,
            f"{target.met} of {target.measured}",
            target.verdict,
        )
    return table


def plan_table(steps: list[Step], card: Device) -> Table:
    """What would be measured, and how long it takes at least on paper."""
    table = Table(box=box.SIMPLE_HEAD, title=f"least time on paper: {card.name}")
    for column in ("linear", "K", "N", "M", "candidate", "us", "bound"):
        table.add_column(column, justify="right" if len(column) < 3 else "left")
    for step in steps:
        for candidate in step.candidates:
            place = step.place
            kernels = works(place, candidate)
            slowest = max(kernels, key=lambda work: work.seconds(card))
            table.add_row(
                place.linear,
                *map(str, (place.in_features, place.out_features, place.tokens)),
                candidate,
                f"{1e6 * sum(work.seconds(card) for work in kernels):.1f}",
                slowest.bound(card),
            )
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return asked.stdout.split()[0]


def describe() -> dict[str, str]:
    """The card and the versions that ran on it."""
    names = ("torch", "triton", "torchao")
    return {
        "card": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cuda": torch.version.cuda or "none",
        **{name: _version(name) for name in names},
    }


def report(results: Results, machine: dict[str, str]) -> dict[str, object]:
    """All of a run, as JSON has it."""
    return {
        **machine,
        "targets": [
            {**dataclasses.asdict(t), "verdict": t.verdict}
            for t in targets(results.rows)
        ],
        "ratios": ratios(results.rows),
        "rows": [dataclasses.asdict(row) for row in results.rows],
        "failed": results.failed,
        "skipped": results.skipped,
    }


def show(results: Results, machine: dict[str, str], console: Console) -> None:
    """Print the tables, what failed, and what was skipped."""
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if results.rows:
        console.print(rows_table(results.rows))
        console.print(ratios_table(ratios(results.rows)))
    console.print(targets_table(targets(results.rows)))
    for failure in results.failed:
        console.print(f"failed: {failure}", markup=False)
    for skipped in results.skipped:
        console.print(f"skipped, no time left: {skipped}", markup=False)


def gpu_builder(
    step: Step,
    device: Optional[torch.device] = None,
    compile: Callable[..., Any] = torch.compile,
) -> Bench:
    """Of the candidates of a step on a GPU; None for the current one."""
    # All are compiled for this place alone, and what the last one held is let go.
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    device = device or torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    cache_bytes = getattr(properties, "L2_cache_size", 64 << 20)
    return Bench(step.place, device, cache_bytes, compile)


@torch.no_grad()
def main(arguments: Optional[list[str]] = None) -> int:
    """Returns 0; 1 where a result is wrong or nothing ran; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Shapes: {'; '.join([*SHAPES.values(), *GROUPS.values()])}",
    )
    parser.add_argument("--seconds", type=float, default=440, help="for all of it")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), help="only these"
    )
    parser.add_argument(
        "--linear", nargs="+", help="only these, such as '7B down'; see below"
    )
    parser.add_argument(
        "--without-torchao", action="store_true", help="leave its candidates out"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be measured, with the roofline, and stop",
    )
    parser.add_argument(
        "--card",
        choices=[device.name for device in DEVICES],
        default="H100",
        help="whose roofline --dry-run prints (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.linear or ()) - {*SHAPES.values(), *GROUPS.values()}
    if unknown:
        parser.error(f"there is no linear {', '.join(map(repr, sorted(unknown)))}")
    wanted = options.linear or [*SHAPES.values(), *GROUPS.values()]
    steps = plan(
        [shape for shape, name in SHAPES.items() if name in wanted],
        options.tokens,
        not options.without_torchao,
        [group for group, name in GROUPS.items() if name in wanted],
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.dry_run:
        card = card_named(options.card)
        assert card is not None
        console.print(plan_table(steps, card))
        return 0
    if not torch.cuda.is_available():
        print(
            "there is no GPU here: run this where there is one, or print what it would "
            "measure with --dry-run.",
            file=sys.stderr,
        )
        return 2
    machine = describe()
    card = card_named(machine["card"])
    if card is None:
        print(
            f"the peaks of {machine['card']} are not known: no roofline is shown.",
            file=sys.stderr,
        )
    results = run(steps, gpu_builder, measure, card, options.seconds)
    show(results, machine, console)
    if options.json is not None:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(report(results, machine), indent=1) + "\n")
    wrong = [row for row in results.rows if row.wrong]
    return 1 if wrong or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main())
