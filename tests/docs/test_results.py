# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The README's numbers are those of the committed results."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

METHODS = {
    "": "",
    "round-to-nearest": "rtn",
    "SmoothQuant": "smoothquant",
    "MBQ": "mbq",
    "SmoothQuant + GPTQ": "gptq",
    "SmoothQuant + one pair": "control",
    "ours without modalities": "pooled",
    "a weight per modality": "mas-unshared",
    "MASQuant, paper": "masquant-paper",
    "ours, no pair": "masquant, no pair",
    "ours": "masquant",
}


def _cell(rows, values, form, scale=1):
    columns = [[scale * v for v in column] for column in zip(*map(values, rows))]
    if not columns:
        return ""
    means = " / ".join(form.format(statistics.mean(c)) for c in columns)
    spread = max(statistics.stdev(c) for c in columns)
    return f"{means} ± {form.format(spread)}"


@pytest.mark.parametrize("variant", ["outliers", "plain"])
def test_readme_table_is_the_committed_result(variant):
    name = f"quality_{variant}.json"
    rows = json.loads((ROOT / "benchmarks/results" / name).read_text())["rows"]
    page = (ROOT / "README.md").read_text()
    shown = page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    lines = re.findall(r"^\| (?:dense|w\da\d) .*$", shown, re.M)
    assert len(lines) > 15
    for line in lines:
        scheme, method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        method = METHODS[method.strip("*")]
        same = [r for r in rows if (r["scheme"], r["method"]) == (scheme, method)]
        assert sorted(row["seed"] for row in same) == [0, 1, 2], (scheme, method)

        def task(key):
            return lambda row: [t[key] for t in row["tasks"].values()]

        expected = [
            _cell(same, task("accuracy"), "{:.1f}", 100),
            _cell(same, task("kl"), "{:.3f}") if method else "",
            _cell(same, lambda row: row["sqnr"].values(), "{:.1f}"),
            f"{same[0]['bytes'] / 1024:.0f}",
        ]
        assert cells == expected


def _spread(row, name, form):
    growth = f"{name}_growth{'' if name == 'blocks' else '_mib'}"
    error = f"{name}_error{'' if name == 'blocks' else '_mib'}"
    return f"{form.format(row[growth])} ± {form.format(row[error])}"


def _serving_lines(part):
    rows = json.loads((ROOT / "benchmarks/results/serving_load.json").read_text())
    for row in rows["loads"]:
        cells = [row["model"], row["load"]]
        if part == "memory":
            cells += [
                f"{row['requests']} ({row['raised']})",
                f"{row['graphs']}",
                f"{row['eager']}",
                f"{row['wrong']}",
                _spread(row, "resident", "{:.2f}"),
                _spread(row, "allocated", "{:.2f}"),
                _spread(row, "blocks", "{:.0f}"),
            ]
        else:
            cells += [f"{row[f'p{p}_ms']:.0f}" for p in (50, 90, 99)]
            cells += [f"{row['per_second']:.1f}"]
        yield f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("part", ["memory", "latency"])
def test_serving_table_is_the_committed_result(part):
    page = (ROOT / "docs/serving.md").read_text()
    shown = page.split(f"<!-- serving_load.json: {part} -->")[1]
    lines = shown.split("<!-- end -->")[0].strip().splitlines()
    assert lines[2:] == list(_serving_lines(part))


def test_plan_table_is_the_committed_result():
    checks = json.loads((ROOT / "benchmarks/results/plan_check.json").read_text())
    page = (ROOT / "docs/plan.md").read_text()
    shown = page.split("<!-- plan_check.json -->")[1].split("<!-- end -->")[0]
    lines = []
    for c in checks["checks"]:
        form = "{:.0f}" if c["unit"] == "bytes" else "{:.2f}"
        numbers = " | ".join(form.format(c[key]) for key in ("predicted", "measured"))
        lines.append(f"| {c['what']} | {numbers} | {c['unit']} | {c['error']:+.1%} |")
    assert shown.strip().splitlines()[2:] == lines
