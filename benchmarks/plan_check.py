# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``masquant plan`` says, against what happens.

    python benchmarks/plan_check.py [--machine PATH] [--json PATH]

Of shapes that no constant was fitted to: the time of linears, and time and peak memory of
solving for the linears of an input, with weights and statistics. Of the small model that
sees and hears: bytes of the quantized linears in each scheme, and the time of calibrating
it. Of a larger random model: time and peak memory of ``calibrate_sequential``, bytes of
the checkpoint that it writes, and time of a call, dense and quantized, for a prompt and for
one more token.

Processor time of one thread throughout, as the constants are; other processes on the
machine are not counted, but slow its memory down.
"""

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import transformers
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
    token_modalities,
)
from torchao_masquant.options import SolverOptions
from torchao_masquant.planning.estimate import (
    linear_seconds,
    plan_calibration,
    plan_inference,
    statistics_bytes,
)
from torchao_masquant.planning.machine import Machine, load_machine
from torchao_masquant.planning.measuring import (
    CHOSEN,
    COMPENSATION,
    FIXED,
    linear_call,
    median_of_three,
    random_statistics,
    solve_once,
)
from torchao_masquant.planning.processor_time import peak_bytes, processor_seconds
from torchao_masquant.planning.skeleton import InputGroup, LinearShape, read_skeleton
from torchao_masquant.planning.weight_bytes import Compensation, weight_bytes
from torchao_masquant.replacing import replacing
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.solver.cost import solver_bytes
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.testing import digits

_LINEARS = ((1536, 896), (896, 1536), (2432, 896))
#: N of each linear, K, modalities, and whether exponent and separation are chosen
_SOLVED: tuple[tuple[tuple[int, ...], int, int, bool], ...] = (
    ((896,), 448, 3, True),
    ((448,), 800, 3, True),
    ((512, 128, 128), 512, 3, True),
    ((1408, 1408), 512, 2, True),
    ((512,), 3072, 2, False),
)
_SMALL_SAMPLES, _SAMPLES = 32, 16
_CONTEXT = 256


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


def check_small_model(machine: Machine, schemes: list[str]) -> list[Check]:
    """Bytes and calibration of the small model."""
    skeleton = read_skeleton(str(digits.checkpoint_path()))
    data = digits.calibration_samples(_SMALL_SAMPLES)
    tokens = sum(s["input_ids"].numel() for s in data)
    checks = []
    for name in schemes:
        scheme = SCHEMES[name]
        model = digits.load_model("outliers")
        started = time.process_time()
        recipe = calibrate(model, data, scheme=name, progress=False)
        seconds = time.process_time() - started
        quantize_(model, masquant_config(recipe))
        linears = [m for m in model.modules() if isinstance(m, MASQuantLinear)]
        stored = sum(m.weight.data.nbytes_stored for m in linears)
        predicted = sum(
            weight_bytes(x.n, x.k, scheme, COMPENSATION) for x in skeleton.linears
        )
        plan = plan_calibration(
            skeleton,
            machine,
            scheme,
            COMPENSATION,
            samples=_SMALL_SAMPLES,
            tokens=tokens // _SMALL_SAMPLES,
            options=SolverOptions(scheme=name),
        )
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
                scheme = None if name is None else SCHEMES[name]
                predicted += linear_seconds(
                    machine,
                    scheme,
                    LinearShape("", n, k),
                    tokens,
                    2,
                    COMPENSATION,
                    others=tokens // 2,
                )
                call = linear_call(scheme, n, k, tokens)
                measured += processor_seconds(call, 0.5)
            what = f"{name or 'dense'}: three linears, {tokens} tokens"
            checks.append(Check(what, "ms", predicted * 1e3, measured * 1e3))
    return checks


def check_solver_time(machine: Machine) -> list[Check]:
    """Of inputs that no constant was fitted to."""
    checks = []
    for outputs, k, modalities, chosen in _SOLVED:
        call, work = solve_once(outputs, k, modalities, chosen)
        what = f"solving, {_name(outputs, k, modalities)}"
        predicted = work.dot(machine.solver)
        checks.append(Check(what, "s", predicted, median_of_three(call)))
    return checks


def check_solver_memory() -> list[Check]:
    """With weights and statistics."""
    checks = []
    # What the libraries take when they are first called.
    for outputs in ((64,), (160,)):
        solve_once(outputs, 128, 2, True)[0]()
    for outputs, k, modalities, chosen in _SOLVED:
        group = InputGroup("", k, outputs)
        options = CHOSEN if chosen else FIXED

        def whole() -> None:
            weights = {
                f"linear {i}": torch.empty(n, k, dtype=torch.bfloat16).normal_()
                for i, n in enumerate(group.outputs)
            }
            found = random_statistics(k, modalities, tokens=512)
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


def check_sequential_time(machine: Machine, dense: Path, output: Path) -> list[Check]:
    """Calibration from disk to disk, and what it writes."""
    skeleton, compensation = read_skeleton(str(dense)), Compensation()
    plan = plan_calibration(
        skeleton,
        machine,
        SCHEMES["w4a8"],
        compensation,
        samples=_SAMPLES,
        tokens=TOKENS,
    )
    started = time.process_time()
    calibrate_sequential(dense, samples(_SAMPLES), output=output, progress=False)
    seconds = time.process_time() - started
    written = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    return [
        Check("w4a8: sequential calibration", "s", plan.seconds, seconds),
        Check("w4a8: checkpoint", "bytes", plan.written_bytes, written),
    ]


def check_sequential_memory(machine: Machine, dense: Path, folder: Path) -> list[Check]:
    """Of calibration from disk to disk."""
    plan = plan_calibration(
        read_skeleton(str(dense)),
        machine,
        SCHEMES["w4a8"],
        Compensation(),
        samples=_SAMPLES,
        tokens=TOKENS,
    )
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


def check_forward(machine: Machine, dense: Path, quantized: Path) -> list[Check]:
    """Calls of a whole model, whose features are made: dense and quantized."""
    checks = []
    skeleton = read_skeleton(str(dense))
    for name, folder in (("dense", dense), ("w4a8", quantized)):
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16
        ).eval()
        scheme = SCHEMES.get(name)
        plan = plan_inference(
            skeleton, machine, scheme, Compensation(), context=_CONTEXT
        )
        x = torch.randn(1, _CONTEXT, skeleton.hidden).bfloat16()
        ids = torch.zeros(1, _CONTEXT, dtype=torch.int64)
        ids[:, : _CONTEXT // 2] = 1
        cache = transformers.DynamicCache(config=model.config.get_text_config())

        def forward(x: torch.Tensor, ids: torch.Tensor) -> None:
            with token_modalities(model, ids) if scheme else nullcontext():
                model(
                    inputs_embeds=x,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )

        def check(what: str, predicted: float, tokens: int) -> None:
            def call() -> None:
                forward(x[:, -tokens:], ids[:, -tokens:])
                cache.crop(-tokens)

            measured = processor_seconds(call, 2.0)
            what = f"{name}: {what}"
            checks.append(Check(what, "ms", predicted * 1e3, measured * 1e3))

        check(f"a prompt of {_CONTEXT} tokens", plan.prefill_seconds, _CONTEXT)
        # These stay in the cache.
        forward(x, ids)
        check("one token more", plan.decode_seconds, 1)
    return checks


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
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    machine = load_machine(options.machine)
    checks = apart(check_linears, machine)
    checks += apart(check_solver_time, machine)
    checks += apart(check_solver_memory)
    checks += apart(check_small_model, machine, options.schemes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, quantized = model_folder(folder / "dense"), folder / "quantized"
        checks += apart(check_sequential_time, machine, dense, quantized)
        checks += apart(check_sequential_memory, machine, dense, folder)
        checks += apart(check_forward, machine, dense, quantized)
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
