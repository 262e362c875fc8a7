# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of what a calibration costs."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_cost.py"


def test_a_narrow_decoder(tmp_path, capsys):
    report = tmp_path / "cost.json"
    main = runpy.run_path(str(SCRIPT))["main"]
    size = ["--hidden", "256", "--intermediate", "320", "--layers", "2"]
    assert main([*size, "--tokens", "512", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [row["layer"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert all(row["solve_s"] > 0 and row["observe_s"] > 0 for row in rows)
    # Two modalities of 320 channels: float64 covariances, 256 float32 tokens.
    down = rows[2]["statistics_gib"] * 2**30
    assert down == 2 * (8 * 320 * 320 + 4 * 256 * 320)
    assert "mlp.down_proj" in capsys.readouterr().out


def test_too_few_tokens_are_refused(capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(SystemExit):
        main(["--tokens", "100"])
    assert "--tokens must be at least 512, got 100." in capsys.readouterr().err
