# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The visit to a GPU, with none: a dry run of all of it, and what it does when all fails."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(KERNELS))


def visit(module: str) -> Any:
    return importlib.import_module(f"gpu_visit.{module}")


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    run = subprocess.run(
        [str(BENCHMARKS / "gpu_visit.sh")],
        env={
            **os.environ,
            "DRY_RUN": "short",
            "OUT": str(tmp_path / "out"),
            "WHEELS": str(tmp_path / "none"),
            "PYTHON": sys.executable,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout
    # What a dry run is asked for, that it finds.
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"visit.json", "visit.log", "triton_sm_dry.json"}
    found = json.loads((tmp_path / "out" / "visit.json").read_text())
    assert set(found) == {
        *("machine", "check", "ceilings", "time", "tune", "time, tuned", "torchao")
    }
    assert found["machine"]["card"] == "NVIDIA H200 of a dry run"
    assert found["check"]["failed"] is None and not found["check"]["unfinished"]
    names = " ".join(found["check"]["done"])
    for about in ("packaged", "compiled", "captured", "called", "guarded", "spans"):
        assert (about in names) is (about != "spans"), about
    measured = {row["candidate"] for row in found["time"]["rows"]}
    assert {
        *("bf16", "w8a8 base", "w4a16 all vision", "product w4a8", "fp8 all vision")
    } <= measured
    assert not found["time"]["failed"] and not found["tune"]["failed"]
    assert "int_linear w8" in {line[0] for line in found["tune"]["measured"]}
    assert found["torchao"]["rows"]


def test_the_first_failure_ends_the_others() -> None:
    processes = visit("processes")
    tasks = [
        processes.Task("right", math.sqrt, (4.0,)),
        processes.Task("wrong", math.sqrt, (-4.0,)),
        *(processes.Task(f"long {i}", time.sleep, (60.0,)) for i in range(3)),
    ]
    told = []
    outcome = processes.run_all(tasks, 1, 60.0, int, lambda o: told.append(o.failed))
    assert list(outcome.done) == ["right"]
    name, error = outcome.failed
    assert name == "wrong" and "ValueError" in error
    assert outcome.unfinished == ["long 0", "long 1", "long 2"] and len(told) == 2


def test_what_takes_too_long_is_named() -> None:
    processes = visit("processes")
    tasks = [processes.Task(f"long {i}", time.sleep, (60.0,)) for i in range(2)]
    outcome = processes.run_all(tasks, 1, 0.5, int)
    assert outcome.failed is None and outcome.unfinished == ["long 0", "long 1"]


def test_the_call_that_fails_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = visit("operator_checks")
    launched = checks.Triton.run
    monkeypatch.setattr(
        checks.Triton, "run", lambda *args: launched(*args) + float("nan")
    )
    with pytest.raises(AssertionError, match="int_linear, one-token.*By one pass"):
        checks.check_case("int_linear", "one-token", str(tmp_path))
    saved = torch.load(tmp_path / "failed.pt", weights_only=False)
    assert saved["case"] == "one-token" and saved["operator"] == "int_linear"
    assert saved["args"][0].dtype == torch.int8 and saved["found"].isnan().all()


def test_wheels_are_for_every_python_and_only_what_is_missing_is_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = visit("wheels")
    names = [
        f"{name.replace('-', '_')}-1.0-py3-none-any.whl" for name in wheels.PACKAGES
    ]
    wheels.check([Path(name) for name in names])
    with pytest.raises(ValueError, match="no wheel was found of torchao"):
        wheels.check([Path(name) for name in names[1:]])
    one = Path("torchao-1.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    with pytest.raises(ValueError, match="for one Python alone"):
        wheels.check([one, *(Path(name) for name in names[1:])])

    for name in ("torch-0.1-py3-none-any.whl", "not_here-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}.py", "")
    wheels.unpack(tmp_path, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["not_here.py"]
    assert "not_here 1.0 is unpacked, in place of none" in capsys.readouterr().out


def test_a_stage_is_added_to_what_there_is(tmp_path: Path) -> None:
    record = visit("record").Record(tmp_path / "visit.json")
    record.write("machine", {"card": "one"})
    record.write("time", [1])
    record.write("time", [1, 2])
    assert json.loads((tmp_path / "visit.json").read_text()) == {
        "machine": {"card": "one"},
        "time": [1, 2],
    }
