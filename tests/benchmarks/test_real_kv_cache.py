# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of quantized caches on a real LLM: a layer of it, and its page."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("real_kv_cache")


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_quick(benchmark, tmp_path, capsys, monkeypatch):
    # A short call of each kind, one of the tasks, and the end of a piece of prose.
    monkeypatch.setattr("real.examples.BATCH", 8)
    monkeypatch.setattr(benchmark, "_PREFIX", 232)
    held = benchmark.heldout_samples
    monkeypatch.setattr(
        benchmark,
        "heldout_samples",
        lambda *size: {t: s for t, s in held(*size).items() if t in ("image", "text")},
    )
    drawn = benchmark.calibration_samples
    monkeypatch.setattr(benchmark, "calibration_samples", lambda seed: drawn(seed)[:5])
    report = tmp_path / "rows.json"
    arguments = ["--examples", "2", "--pieces", "2", "--layers", "1"]
    assert benchmark.main([*arguments, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert capsys.readouterr().out == benchmark.table(rows) + "\n"
    kl = {(r["bits"], r["cache"]): r["tasks"]["text"]["kl"] for r in rows}
    assert 0 < kl[8, "**ours**"] < kl[4, "**ours**"] < kl[4, "as they are"]


def test_the_page_has_the_committed_results(benchmark):
    rows = json.loads((RESULTS / "real_kv_cache.json").read_text())["rows"]
    page = (ROOT / "docs" / "kv_cache.md").read_text()
    shown = page.split("<!-- real_kv_cache.json -->\n")[1].split("<!-- end -->")[0]
    assert shown == benchmark.table(rows)
