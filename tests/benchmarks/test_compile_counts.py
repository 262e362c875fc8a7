# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the benchmark of compile counts promises."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quantizing_adds_no_break_and_one_graph(one_layer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    counts = importlib.import_module("compile_counts")
    # The first lengths and tokens make the graphs; the others meet them.
    monkeypatch.setattr(counts, "_LENGTHS", 4)
    monkeypatch.setattr(counts, "_NEW_TOKENS", 4)
    # The other calls are among these, and layers one by one are what tests/routing has.
    for key in [
        k for k in counts.CALLS if "both kinds" not in k and "generate" not in k
    ]:
        monkeypatch.delitem(counts.CALLS, key)
    monkeypatch.delitem(counts.COMPILED, "layers")
    report = tmp_path / "counts.json"
    counts.main(["--json", str(report)])
    # A main that runs inside of another process leaves its gradients alone.
    assert torch.is_grad_enabled()
    rows = json.loads(report.read_text())
    dense = {(r["compiled"], r["calls"]): r for r in rows if r["model"] == "dense"}
    quantized = {(r["compiled"], r["calls"]): r for r in rows if r["model"] == "w4a8"}
    assert dense and set(dense) == set(quantized)
    for key, row in quantized.items():
        assert row["breaks"] == dense[key]["breaks"] == 0
        # Base-only and mixed calls are two graphs where both kinds run.
        extra = 1 if "both kinds" in key[1] else 0
        assert row["graphs"] == dense[key]["graphs"] + extra, key
        assert row["graphs"] <= 3, key
