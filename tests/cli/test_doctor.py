# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Libraries that are installed and cannot be imported: who is told what."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchao_masquant.cli.imports import try_imports
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


def _run(broken: Path, *arguments: object) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "torchao_masquant", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(broken)},
    )


def test_each_way_to_fail_is_told_and_none_hides_the_next(broken, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(broken))
    names = ["json", "torchvision", "soundfile", "soxr", "no_such_library", "datasets"]
    assert try_imports(names) == {
        "json": "",
        "torchvision": "RuntimeError: operator torchvision::nms does not exist",
        "soundfile": "ends the process with code 11",
        "soxr": "No module named 'missing_part_of_soxr'",
        "no_such_library": "not installed",
        "datasets": "",
    }


def test_doctor_vouches_for_what_it_has_imported(broken):
    ended = _run(broken, "doctor", "--json")
    told = json.loads(ended.stdout)
    assert told["libraries"]["torchvision"].startswith("fails (")
    assert told["libraries"]["datasets"].startswith("yes (")
    (problem,) = [p for p in told["problems"] if p.startswith("torchvision")]
    assert "cannot be imported (RuntimeError: operator torchvision::nms does" in problem
    assert ended.returncode == 1


def test_calibrate_names_the_library_and_not_the_class_behind_which_it_broke(
    broken, tmp_path
):
    model = model_folders.vision_model(tmp_path / "model")
    data = model_folders.vision_samples(tmp_path)
    ended = _run(broken, "calibrate", model, data, "-o", tmp_path / "r.safetensors")
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "needs torchvision, which is installed but cannot be imported" in last
    assert "operator torchvision::nms does not exist" in last
