# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The README's numbers are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_table_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks/results/demo_outliers.json").read_text())[
        "rows"
    ]
    lines = re.findall(
        r"^\| (?:dense|w\da\d) .*$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(lines) == len(rows) == 13
    for line, row in zip(lines, rows):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["scheme"]
        for cell, values, form, factor in (
            (cells[2], row["accuracy"], "{:.1f}", 100),
            (cells[3], row["cross_entropy"], "{:.3f}", 1),
            (cells[4], row["sqnr"], "{:.1f}", 1),
        ):
            expected = " / ".join(form.format(factor * v) for v in values.values())
            assert cell == expected
        assert cells[5] == f"{row['weight_bytes'] / 1024:.0f}"
