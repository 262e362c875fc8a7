# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``vllm serve`` under good and broken requests, in short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_soak.py"


def test_no_answer_is_wrong_and_what_is_broken_is_refused(tmp_path):
    file = tmp_path / "told.json"
    command = [sys.executable, SCRIPT, "--models", "w4a8", "--requests", "20"]
    command += ["--json", file]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    [told] = json.loads(file.read_text())["runs"]
    assert told["wrong"] == []
    assert sum(told["answered"].values()) == 16 and told["gone"] == 1
    assert set(told["refused"]) == {"no image", "no sound", "too long"}
    for known in told["refused"].values():
        assert all(said.startswith("400: ") for said in known)
    assert told["running"] == 0
