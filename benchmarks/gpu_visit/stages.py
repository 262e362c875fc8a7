# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The stages of a visit. Each writes what it has to the record after every step."""

import dataclasses
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any, Callable

import gpu_linear
import torch
from gpu_bench import timing
from gpu_bench.plan import (
    BF16,
    FP8_PRODUCT,
    INT8_PRODUCT,
    PRODUCT,
    TORCHAO,
    Place,
    Step,
    card_named,
    rank_of,
)
from gpu_linear import Results
from rich.console import Console

from gpu_visit import linear_checks
from gpu_visit.place import begin, device, is_dry, linear_builder
from gpu_visit.processes import Outcome, Task, run_all
from gpu_visit.record import Record
from torchao_masquant import SCHEMES
from torchao_masquant.kernels.gpu import measuring, tuning
from torchao_masquant.kernels.gpu.measuring import LinearShape, linear_calls, tune
from torchao_masquant.kernels.gpu.operators import operators

__all__ = ["STAGES", "Visit"]

# K, N and tokens, the most telling first; see gpu_bench.plan for whose they are.
_PLACES = (
    (3584, 18944, 8192),
    (3584, 18944, 1),
    (18944, 3584, 1),
    (18944, 3584, 8192),
    (3584, 3584, 2048),
    (3584, 3584, 1),
    (3584, 18944, 16),
    (3584, 18944, 256),
    (2048, 11008, 1),
    (2048, 11008, 2048),
)
_DRY_PLACES = ((128, 16, 17), (128, 16, 1))
_OURS = ("w8a8", "w4a8", "w4a16", "fp8")
# Of its roofline; what reaches less is tuned, where it is of integers.
_ENOUGH = 0.75
_TUNED = tuple(s for s in _OURS if SCHEMES[s].act_format is None)
# Seconds that a step may take before one of its kind was seen, and a shape's tuning.
_UNSEEN, _TUNING = 15.0, 12.0


@dataclasses.dataclass(frozen=True)
class Visit:
    """
    Attributes:
        record: of all stages.
        folder: for files beside it.
        until: this stage's end, in seconds since the epoch.
    """

    record: Record
    folder: Path
    until: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    @property
    def workers(self) -> int:
        """Processes that compile."""
        return max(1, min(12, (os.cpu_count() or 1) - 4))


def machine() -> dict[str, Any]:
    """The card, and what is installed."""
    properties = torch.cuda.get_device_properties(device())
    return {
        **gpu_linear.describe(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 MiB": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
    }


def steps() -> list[Step]:
    """What is checked, measured and tuned."""
    places = {"short": _DRY_PLACES[:1], "whole": _DRY_PLACES}.get(is_dry(), _PLACES)
    return [_step(Place(*place)) for place in places]


def _step(place: Place) -> Step:
    products = [f"{PRODUCT} w8a8", f"{PRODUCT} w4a8", FP8_PRODUCT]
    # torch's takes no fewer.
    products += [INT8_PRODUCT] if place.tokens > 16 else []
    mixes = ("base", "half vision", "all vision")
    mixed = [m for m in mixes if place.tokens > 1 or m != "half vision"]
    ours = [f"{scheme} {mix}" for scheme in _OURS for mix in mixed]
    ours = [*ours[::4], ours[-1]] if is_dry() == "short" else ours
    return Step(place, (BF16, *products, *ours))


def check(visit: Visit) -> bool:
    """Operators, linears, and all that is measured later, until one is wrong."""
    from gpu_visit import operator_checks

    short = is_dry() == "short"
    kinds = list(linear_checks.KINDS)[: 1 if short else None]
    tasks = [
        Task(f"{operator}, {id}", operator_checks.check_case, (operator, id, folder))
        for folder in (str(visit.folder),)
        for operator, id in operator_checks.names(quick=bool(is_dry()))
    ]
    # Those that take long first: others fill the time beside them.
    whole = [
        Task(f"{function.__name__}, {kind}", function, (kind,))
        for function in (
            linear_checks.packaged,
            linear_checks.compiled,
            linear_checks.captured,
            linear_checks.called,
        )
        for kind in kinds
    ]
    whole.append(Task("guarded", linear_checks.guarded))
    sizes = [
        Task(f"{_where(step)}: {name}", linear_checks.candidate, (step, name))
        for step in steps()
        for name in step.candidates
        if name.partition(" ")[0] in _OURS or name.startswith(f"{PRODUCT} w")
    ]

    def tell(outcome: Outcome) -> None:
        visit.record.write("check", dataclasses.asdict(outcome))

    outcome = run_all(
        [*whole[:1], *tasks, *whole[1:], *sizes],
        visit.workers,
        visit.left,
        begin,
        tell,
    )
    tell(outcome)
    print(f"{len(outcome.done)} checks passed, {len(outcome.unfinished)} were not made")
    if outcome.failed:
        print("FAILED: {}\n{}".format(*outcome.failed))
    return outcome.failed is None


def _where(step: Step) -> str:
    place = step.place
    return f"K={place.in_features} N={place.out_features} M={place.tokens}"


def measure(visit: Visit) -> bool:
    """What the card does at most, then the linears."""
    visit.record.write("ceilings", ceilings())
    return _measured(visit, "time", steps())


def torchao(visit: Visit) -> bool:
    """Its linears beside ours; they are compiled, which takes long."""
    places = [step.place for step in steps()[:2]]
    chosen = (BF16, "w8a8 base", "w4a16 base", *TORCHAO)
    if is_dry() == "short":
        chosen = (BF16, "w8a8 base", TORCHAO[1])
    return _measured(visit, "torchao", [Step(place, chosen) for place in places])


def _measured(visit: Visit, name: str, chosen: list[Step]) -> bool:
    described = machine()

    def tell(results: Results) -> None:
        visit.record.write(name, gpu_linear.report(results, {}))

    results = gpu_linear.run(
        chosen,
        linear_builder,
        timing.measure,
        card_named(described["card"]),
        visit.left,
        unseen=1.0 if is_dry() else _UNSEEN,
        tell=tell,
    )
    tell(results)
    gpu_linear.show(results, described, Console(width=200))
    return bool(results.rows) and not any(row.wrong for row in results.rows)


def ceilings() -> dict[str, float]:
    """Memory's GB/s (read and written) and the TFLOP/s of products, as PyTorch has them."""
    size, large = (32, 1 << 10) if is_dry() else (8192, 1 << 30)
    source = torch.ones(large, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device()).bfloat16()
    q = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device())
    found = timing.measure(
        {
            "copy": [lambda: target.copy_(source)],
            "bf16": [lambda: a @ a.t()],
            "int8": [lambda: torch._int_mm(q, q.t())],
        },
        0.5,
    )
    micro = {name: measured.graph for name, measured in found.items()}
    return {
        "copy GB/s": 2e-3 * large / micro["copy"],
        "bf16 TFLOP/s": 2e-6 * size**3 / micro["bf16"],
        "int8 TOP/s": 2e-6 * size**3 / micro["int8"],
    }


def compile_tilings(shape: LinearShape, tokens: int, part: int, parts: int) -> None:
    """Compile one of so many parts of the tilings of a linear, for Triton's cache."""
    from triton.runtime.errors import OutOfResources

    calls = linear_calls(shape, tokens, torch.bfloat16, device())
    for name, args in calls:
        launch = operators()[name].launch
        with tuning.questions() as asked:
            launch(*args)
        question = next(q for q in asked if q.kernel.split()[0] == name)
        for config in question.configs[part::parts]:
            try:
                launch(*args, config=config)
            except OutOfResources:
                continue


def tune_slow(visit: Visit) -> bool:
    """Tune what was far from its roofline, then measure it again."""
    slow = _slow(visit.record.read().get("time", {}).get("rows", []))
    found: dict[str, Any] = {"slow": [f"{_where(s)}: {n}" for s, n in slow]}
    parts = 1 if is_dry() else visit.workers
    tasks = [
        Task(f"compile {shape}, {tokens}", compile_tilings, (shape, tokens, i, parts))
        for shape, tokens in _shapes(slow)
        for i in range(parts)
    ]
    if tasks and is_dry() != "short":
        # What is not compiled in time is compiled when it is tuned.
        outcome = run_all(tasks, visit.workers, visit.left / 3, begin)
        found["compiled"] = dataclasses.asdict(outcome)
    found["measured"], found["failed"] = [], []

    def told(measured: measuring.Measured) -> None:
        times = [[str(entry.to_json()), ms] for entry, ms in measured.times]
        question, entry = measured.question, measured.entry
        line = [question.kernel, question.key, entry.to_json(), times]
        found["measured"].append(line)
        print(json.dumps(line[:3]))

    for shape, tokens in _shapes(slow):
        if visit.left < _TUNING * 2 and not is_dry():
            found["failed"].append(f"no time left for {shape}, {tokens}")
            continue
        try:
            table = tune(
                [shape],
                [tokens],
                device=device(),
                clock=measuring.gpu_clock,
                tell=told,
            )
            shutil.copy(table, visit.folder / table.name)
        except RuntimeError as error:
            found["failed"].append(f"{shape}, {tokens}: {error}")
        visit.record.write("tune", found)
    visit.record.write("tune", found)
    again = list(dict.fromkeys(step for step, _ in slow))
    for failure in found["failed"]:
        print(f"failed: {failure}")
    if not again:
        return True
    return _measured(visit, "time, tuned", again) and not found["failed"]


def _slow(rows: list[dict[str, Any]]) -> list[tuple[Step, str]]:
    """Of ours and base-only: what reaches too little of its roofline."""
    known = {_where(step): step for step in steps()}
    slow = []
    for row in rows:
        where = f"K={row['in_features']} N={row['out_features']} M={row['tokens']}"
        ours = row["candidate"] in [f"{scheme} base" for scheme in _TUNED]
        if ours and row["paper"] and row["paper"] / row["graph"] < _ENOUGH:
            slow.append((known[where], row["candidate"]))
    return slow


def _shapes(slow: list[tuple[Step, str]]) -> list[tuple[LinearShape, int]]:
    shapes = []
    for step, candidate in slow:
        place, scheme = step.place, SCHEMES[candidate.partition(" ")[0]]
        k, n = place.in_features, place.out_features
        bits = (scheme.weight_bits, scheme.act_bits, scheme.group_size)
        shapes.append((LinearShape(n, k, *bits, rank_of(k, n)), place.tokens))
    return shapes


STAGES: dict[str, Callable[[Visit], bool]] = {
    "check": check,
    "time": measure,
    "tune": tune_slow,
    "torchao": torchao,
}
