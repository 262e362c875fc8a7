# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``masquant plan`` says, against what happens.

    python benchmarks/plan_check.py [--json PATH]

Peak memory of solving for the linears of an input, with weights and statistics. Of the small
model that sees and hears: bytes of the quantized linears in each scheme. Of a larger random
model: peak memory of ``calibrate_sequential``, and bytes of the checkpoint that it writes.
"""

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from peak_memory import peak_bytes
from plan_model import TOKENS, model_folder, samples
from rich import box
from rich.console import Console
from rich.table import Table
from torchao.quantization import quantize_

from torchao_masquant import (
    SCHEMES,
    MASQuantLinear,
    calibrate,
    masquant_config,
)
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.options import SolverOptions
from torchao_masquant.planning.estimate import (
    CalibrationPlan,
    plan_calibration,
    statistics_bytes,
)
from torchao_masquant.planning.skeleton import InputGroup, read_skeleton
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.solver.cost import solver_bytes
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.testing import digits
from torchao_masquant.weight_bytes import Compensation, weight_bytes

_COMPENSATION = Compensation(modalities=3)
_CHOSEN = SolverOptions(alpha="auto", separation="auto")
_FIXED = SolverOptions(alpha=0.5, separation=1.0)
#: N of each linear, K, modalities, and whether exponent and separation are chosen
_SOLVED: tuple[tuple[tuple[int, ...], int, int, bool], ...] = (
    ((896,), 448, 3, True),
    ((448,), 800, 3, True),
    ((512, 128, 128), 512, 3, True),
    ((1408, 1408), 512, 2, True),
    ((512,), 3072, 2, False),
)
_SMALL_SAMPLES, _SAMPLES = 32, 16


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


def check_small_model(schemes: list[str]) -> list[Check]:
    """Bytes of the small model's quantized linears."""
    skeleton = read_skeleton(str(digits.checkpoint_path()))
    data = digits.calibration_samples(_SMALL_SAMPLES)
    checks = []
    for name in schemes:
        model = digits.load_model("outliers")
        quantize_(
            model,
            masquant_config(calibrate(model, data, scheme=name, progress=False)),
        )
        linears = [m for m in model.modules() if isinstance(m, MASQuantLinear)]
        stored = sum(m.weight.data.nbytes_stored for m in linears)
        predicted = sum(
            weight_bytes(x.n, x.k, SCHEMES[name], _COMPENSATION)
            for x in skeleton.linears
        )
        checks.append(Check(f"{name}: quantized linears", "bytes", predicted, stored))
    return checks


def check_solver_memory() -> list[Check]:
    """With weights and statistics."""
    checks = []
    # What the libraries take when they are first called.
    for n in (64, 160):
        weight = torch.empty(n, 128, dtype=torch.bfloat16).normal_()
        solve_group({"": weight}, _random_statistics(128, 2), _CHOSEN)
    for outputs, k, modalities, chosen in _SOLVED:
        group = InputGroup("", k, outputs)
        options = _CHOSEN if chosen else _FIXED

        def whole() -> None:
            weights = {
                f"linear {i}": torch.empty(n, k, dtype=torch.bfloat16).normal_()
                for i, n in enumerate(group.outputs)
            }
            found = _random_statistics(k, modalities)
            solve_group(weights, found, options, spend_statistics=True)

        predicted = statistics_bytes([group], modalities) + 2 * group.values
        predicted += max(
            solver_bytes(n, k, group.values, modalities, options) for n in outputs
        )
        what = f"peak memory of solving, {_name(outputs, k, modalities)}"
        measured = peak_bytes(whole)
        checks.append(Check(what, "MiB", predicted / 2**20, measured / 2**20))
    return checks


def _name(outputs: tuple[int, ...], k: int, modalities: int) -> str:
    return f"{' + '.join(map(str, outputs))} x {k}, {modalities} modalities"


def check_checkpoint(dense: Path, output: Path) -> list[Check]:
    """What calibration from disk to disk writes."""
    plan = _plan(dense)
    calibrate_sequential(dense, samples(_SAMPLES), output=output, progress=False)
    written = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    return [Check("w4a8: checkpoint", "bytes", plan.written_bytes, written)]


def check_sequential_memory(dense: Path, folder: Path) -> list[Check]:
    """Of calibration from disk to disk."""
    plan = _plan(dense)
    data = samples(_SAMPLES)

    def whole() -> None:
        calibrate_sequential(dense, data, output=folder / "again", progress=False)

    # What is loaded once.
    calibrate_sequential(
        model_folder(folder / "one block", 1),
        data[:2],
        output=folder / "first",
        alpha=0.5,
        separation=1.0,
        progress=False,
    )
    predicted = plan.device_bytes + plan.activation_bytes
    what = "w4a8: peak memory of sequential calibration"
    return [Check(what, "MiB", predicted / 2**20, peak_bytes(whole) / 2**20)]


def _plan(dense: Path) -> CalibrationPlan:
    return plan_calibration(
        read_skeleton(str(dense)),
        SCHEMES["w4a8"],
        Compensation(),
        samples=_SAMPLES,
        tokens=TOKENS,
    )


def _random_statistics(k: int, modalities: int) -> InputStatistics:
    names = tuple(f"modality {index}" for index in range(modalities))
    found = InputStatistics(k, names, torch.device("cpu"), True)
    for index in range(modalities):
        found.update("", torch.randn(512, k), torch.full((512,), index))
    return found


def apart(check: Callable[..., list[Check]], *arguments: Any) -> list[Check]:
    """In a new process, whose allocator others have not filled."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _alone) as pool:
        return pool.submit(check, *arguments).result()


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def main(arguments: Optional[list[str]] = None) -> list[Check]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    checks = apart(check_solver_memory)
    checks += apart(check_small_model, options.schemes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = model_folder(folder / "dense")
        checks += apart(check_checkpoint, dense, folder / "quantized")
        checks += apart(check_sequential_memory, dense, folder)
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
        found = [{**dataclasses.asdict(c), "error": c.error} for c in checks]
        write_whole(options.json, json.dumps({"checks": found}, indent=2) + "\n")
    return checks


if __name__ == "__main__":
    main()
