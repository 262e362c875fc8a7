# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of a sequential calibration's memory, and what is said of its result."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_narrow_decoder(tmp_path):
    report = tmp_path / "memory.json"
    script = str(ROOT / "benchmarks" / "sequential_memory.py")
    size = ["--hidden", "256", "--inner", "320", "--layers", "2", "--samples", "1"]
    arguments = ["--folder", str(tmp_path), "--tokens", "32", "--json", str(report)]
    subprocess.run([sys.executable, script, *size, *arguments], check=True)
    (row,) = json.loads(report.read_text())["rows"]
    assert row["layers"] == 2 and row["quantized_gib"] > 0
    assert row["peak_anonymous_gib"] >= row["program_gib"] > 0
    # Nothing but the report is left.
    assert list(tmp_path.iterdir()) == [report]


def test_the_page_shows_the_committed_result():
    rows = json.loads((ROOT / "benchmarks/results/sequential_memory.json").read_text())
    page = (ROOT / "docs/sequential.md").read_text()
    shown = page.split("<!-- sequential_memory.json -->")[1].split("<!-- end -->")[0]
    lines = re.findall(r"^\| \d.*$", shown, re.M)
    assert len(lines) == len(rows["rows"]) >= 3
    for line, row in zip(lines, sorted(rows["rows"], key=lambda r: r["layers"])):
        expected = [
            str(row["layers"]),
            f"{row['model_gib']:.2f}",
            f"{row['peak_anonymous_gib']:.2f}",
            f"{row['peak_anonymous_gib'] - row['program_gib']:.2f}",
            f"{row['block_s']:.0f}",
        ]
        assert [cell.strip() for cell in line.strip("|").split("|")] == expected
    # Flat: three times the layers, and as much memory.
    peaks = [row["peak_anonymous_gib"] for row in rows["rows"]]
    assert max(peaks) < 1.15 * min(peaks)
