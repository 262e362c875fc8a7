# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``doctor``, and libraries that are installed and cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import run

from torchao_masquant import SCHEMES
from torchao_masquant.cli import diagnosis
from torchao_masquant.cli.imports import NOT_INSTALLED
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.testing import model_folders


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of libraries, each broken in its own way."""
    parts = {
        # As a release that was built for another torch says it.
        "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
        "soxr": "import missing_part_of_soxr",
        "soundfile": "import os; os._exit(11)",
        "datasets": "print('a banner')",
    }
    for name, text in parts.items():
        (tmp_path / "libraries" / name).mkdir(parents=True)
        (tmp_path / "libraries" / name / "__init__.py").write_text(text + "\n")
    # Whether it is installed is read from here.
    metadata = tmp_path / "libraries" / "torchvision-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    return tmp_path / "libraries"


def test_doctor_tells_what_runs_and_vouches_for_what_it_has_imported(
    broken, monkeypatch, capsys
):
    """However a library fails, and whatever it prints, the next one is looked at."""
    monkeypatch.setenv("PYTHONPATH", str(broken))
    assert run("doctor", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["cpu"]["engine"] == cpu_lowering.engine().engine.value
    rows = {r["scheme"]: r for r in told["kernels"] if r["device"] == "cpu"}
    assert set(rows) == set(SCHEMES)
    for name, row in rows.items():
        if SCHEMES[name].act_format is not None:
            assert row["many"] == row["few"] == "reference: emulated in float32"
            form = SCHEMES[name].act_format
            assert row["reason"] == f"no CPU multiplies {form!r}"
            continue
        assert row["reason"] == cpu_lowering.engine().reason
        assert row["many"] == cpu_lowering.kernel_of(
            weight_bits=SCHEMES[name].weight_bits,
            act_bits=SCHEMES[name].act_bits,
            tokens=256,
            in_features=4096,
            groups=32 if SCHEMES[name].group_size else 1,
        )
    libraries = {n: text.partition(" (")[0] for n, text in told["libraries"].items()}
    failing = {"torchvision", "soundfile", "soxr"}
    assert {n for n, answer in libraries.items() if answer == "fails"} == failing
    assert libraries["datasets"] == libraries["PIL"] == "yes"
    reasons = {
        problem.partition(",")[0]: problem.partition("cannot be imported (")[2]
        for problem in told["problems"]
    }
    assert reasons["torchvision"].startswith(
        "RuntimeError: operator torchvision::nms does not exist)"
    )
    assert reasons["soundfile"].startswith("ends the process with code 11)")
    assert reasons["soxr"].startswith("No module named 'missing_part_of_soxr')")


def test_doctor_speaks_to_people_too(monkeypatch, capsys):
    found = {name: NOT_INSTALLED for name in ("av", "datasets")}
    monkeypatch.setattr(diagnosis, "try_imports", lambda names: found)
    assert run("doctor") == (1 if diagnosis.diagnose().problems else 0)
    said = capsys.readouterr().out
    assert "Kernel of the product" in said and "no (videos)" in said


def test_doctor_does_not_hide_that_kernels_cannot_be_built(tmp_path):
    """A machine without a compiler: the reference runs, and that is a problem."""
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "MASQUANT_CACHE_DIR": str(tmp_path),
    }
    environment.pop("MASQUANT_CPU_ENGINE", None)
    result = subprocess.run(
        [sys.executable, "-m", "torchao_masquant", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    told = json.loads(result.stdout)
    if "VNNI" not in told["cpu"]["reason"] and not told["problems"]:
        pytest.skip("this processor has no kernels to build")
    assert result.returncode == 1
    assert told["cpu"]["engine"] == "reference"
    assert "no-such-compiler" in told["cpu"]["compiler"]
    assert "cannot be built" in told["problems"][0]
    assert all(
        "reference" in r["many"] for r in told["kernels"] if r["device"] == "cpu"
    )


def test_calibrate_names_the_library_and_not_the_class_behind_which_it_broke(
    broken, tmp_path
):
    model = model_folders.vision_model(tmp_path / "model")
    data = model_folders.vision_samples(tmp_path)
    words = ["calibrate", model, data, "-o", tmp_path / "r.safetensors"]
    ended = subprocess.run(
        [sys.executable, "-m", "torchao_masquant", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(broken)},
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "needs torchvision, which is installed but cannot be imported" in last
    assert "operator torchvision::nms does not exist" in last


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "GOMP_SPINCOUNT = '3000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY = 'PASSIVE'"),
    ],
    ids=["by default", "the user's number", "the user's policy"],
)
def test_threads_of_a_command_sleep_soon_unless_the_user_says_how_they_wait(
    given, expected
):
    """GCC's OpenMP, which torch loads, says what it has read."""
    own = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {k: v for k, v in os.environ.items() if k not in own}
    done = subprocess.run(
        [sys.executable, "-m", "torchao_masquant", "doctor"],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr
    if "OMP_WAIT_POLICY" in given:
        assert "GOMP_SPINCOUNT = '3000'" not in done.stdout + done.stderr
