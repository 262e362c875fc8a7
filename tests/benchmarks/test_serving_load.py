# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of serving load, in short: right results, and nothing left behind."""

import runpy
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config
from torchao_masquant.testing import digits

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_load.py"


@pytest.mark.slow
def test_threads_arrivals_and_exceptions() -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    model = digits.load_model("outliers")
    recipe = calibrate(
        model, digits.calibration_samples(4), scheme="w4a8", rank=8, progress=False
    )
    quantize_(model, masquant_config(recipe))
    rows = benchmark["measure"](model, calls=54, generated=18, threads=4)
    assert len(rows) == 4
    for row in rows:
        assert row.wrong == 0 and row.raised > 0, row
        assert row.p50_ms <= row.p90_ms <= row.p99_ms


def test_a_wrong_result_is_seen() -> None:
    """Another modality's smoothing changes a result by more than is let pass."""
    benchmark = runpy.run_path(str(SCRIPT))
    expected = torch.randn(1, 3, 8)
    same = benchmark["same"]
    assert same(expected + 1e-6, expected)
    assert not same(expected + 1e-2, expected)
    assert not same(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]))


def test_broken_requests_raise_after_routing() -> None:
    benchmark = runpy.run_path(str(SCRIPT))
    made = benchmark["prompts"](24)
    kinds = [kind for kind, _ in made]
    assert kinds.count("broken") == 3 and set(kinds) > {
        "text",
        "image",
        "audio",
        "both",
    }
    assert len({i["input_ids"].shape[1] for _, i in made}) > 4
    broken = next(inputs for kind, inputs in made if kind == "broken")
    model = digits.load_model("outliers")
    with torch.no_grad(), pytest.raises(ValueError):
        model(**broken)
