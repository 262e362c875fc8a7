# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``masquant plan`` says, against what happens.

    python benchmarks/plan_check.py [--machine PATH] [--json PATH]

Of the small model: bytes of the quantized linears in each scheme, and the processor time
of their calibration. Of shapes that no constant was fitted to: the time of linears, and
of solving for one; and its peak memory with the weight and the statistics. Processor
time of one thread throughout, as the constants are; other processes on the machine are
not counted, but slow its memory down.
"""

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torchao.quantization import quantize_

from torchao_masquant import SCHEMES, MASQuantLinear, calibrate, masquant_config
from torchao_masquant.planning.estimate import (
    linear_seconds,
    plan_calibration,
    statistics_bytes,
)
from torchao_masquant.planning.machine import Machine, load_machine
from torchao_masquant.planning.measuring import (
    COMPENSATION,
    make_weight,
    mixed_ids,
    peak_bytes,
    processor_seconds,
    random_statistics,
)
from torchao_masquant.planning.skeleton import InputGroup, LinearShape, read_skeleton
from torchao_masquant.planning.weight_bytes import weight_bytes
from torchao_masquant.replacing import replacing
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.testing import digits

_LINEARS = ((1536, 896), (896, 1536), (2432, 896))
_SOLVED = ((448, 896), (800, 448))
_SAMPLES = 32


@dataclass
class Check:
    """One prediction.

    Attributes:
        what: was predicted.
        unit: of both numbers.
        predicted: by the plan.
        measured: here.
    """

    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def check_model(machine: Machine, schemes: list[str]) -> list[Check]:
    """Bytes and calibration of the small model."""
    skeleton = read_skeleton(str(digits.checkpoint_path()))
    samples = digits.calibration_samples(_SAMPLES)
    tokens = sum(s["input_ids"].numel() for s in samples)
    checks = []
    for name in schemes:
        scheme = SCHEMES[name]
        model = digits.load_model("outliers")
        started = time.process_time()
        recipe = calibrate(model, samples, scheme=name, progress=False)
        seconds = time.process_time() - started
        quantize_(model, masquant_config(recipe))
        linears = [m for m in model.modules() if isinstance(m, MASQuantLinear)]
        stored = sum(m.weight.data.nbytes_stored for m in linears)
        predicted = sum(
            weight_bytes(x.n, x.k, scheme, COMPENSATION) for x in skeleton.linears
        )
        plan = plan_calibration(skeleton, machine, scheme, COMPENSATION, tokens=tokens)
        checks.append(Check(f"{name}: quantized linears", "bytes", predicted, stored))
        checks.append(Check(f"{name}: calibration", "s", plan.seconds, seconds))
    return checks


def check_linears(machine: Machine) -> list[Check]:
    """Time of linears, of shapes that no constant was fitted to."""
    checks = []
    for name in (None, "w8a8", "w4a8", "w4a16"):
        for tokens in (1, 192):
            predicted = measured = 0.0
            for n, k in _LINEARS:
                x, ids = torch.randn(tokens, k).bfloat16(), mixed_ids(tokens)
                others = 0 if ids is None else int((ids > 0).sum())
                scheme = None if name is None else SCHEMES[name]
                predicted += linear_seconds(
                    machine,
                    scheme,
                    LinearShape("", n, k),
                    tokens,
                    2,
                    COMPENSATION,
                    others=others,
                )
                call: Callable[[], Any]
                if scheme is None:
                    dense = torch.randn(n, k).bfloat16()
                    call = partial(torch.nn.functional.linear, x, dense)
                else:
                    weight = make_weight(scheme, n, k)
                    call = partial(torch.ops.masquant.linear, x, weight, ids)
                measured += processor_seconds(call, 0.1)
            what = f"{name or 'dense'}: three linears, {tokens} tokens"
            checks.append(Check(what, "ms", predicted * 1e3, measured * 1e3))
    return checks


def check_solver(machine: Machine) -> list[Check]:
    """Time and memory of solving, of shapes that no constant was fitted to."""
    checks = []
    options = SolverOptions(scheme="w4a8")
    for k, n in _SOLVED:
        weights = {"linear": torch.randn(n, k).bfloat16()}
        found = random_statistics(k)
        started = time.process_time()
        solve_group(weights, found, options)
        seconds = time.process_time() - started
        predicted = machine.solver.seconds_of(k, n, COMPENSATION.modalities)
        checks.append(Check(f"solving, {n} x {k}", "s", predicted, seconds))
    # Last, since it makes the allocator slow.
    for k, n in _SOLVED:
        group = [InputGroup("", k, n)]
        held = statistics_bytes(group, COMPENSATION.modalities)
        predicted = held + machine.solver.workspace_of(k, n) + 2 * n * k

        def whole(k: int = k, n: int = n) -> None:
            weights = {"linear": torch.empty(n, k, dtype=torch.bfloat16).normal_()}
            solve_group(weights, random_statistics(k), options)

        measured = peak_bytes(whole)
        what = f"peak memory of calibrating, {n} x {k}"
        checks.append(Check(what, "MiB", predicted / 2**20, measured / 2**20))
    return checks


def main(arguments: Optional[list[str]] = None) -> list[Check]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    machine = load_machine(options.machine)
    torch.set_num_threads(1)
    with torch.no_grad():
        checks = check_linears(machine)
        checks += check_model(machine, options.schemes)
        checks += check_solver(machine)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "predicted", "measured", "", "error"):
        table.add_column(column, justify="right" if column else "left")
    for c in checks:
        precision = 0 if c.unit == "bytes" else 2
        table.add_row(
            c.what,
            f"{c.predicted:.{precision}f}",
            f"{c.measured:.{precision}f}",
            c.unit,
            f"{c.error:+.1%}",
        )
    Console().print(table)
    if options.json is not None:
        record = {
            "machine": machine.source,
            "checks": [{**dataclasses.asdict(c), "error": c.error} for c in checks],
        }
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    return checks


if __name__ == "__main__":
    main()
