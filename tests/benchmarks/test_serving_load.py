# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of serving load, in short: right results, and nothing left behind."""

import functools
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config
from torchao_masquant.testing import digits

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serving_load")


@pytest.fixture
def alone(benchmark):
    return importlib.import_module("serving_bench.alone")


@pytest.fixture
def memory(benchmark):
    return importlib.import_module("serving_bench.memory")


@pytest.mark.slow
def test_threads_arrivals_and_exceptions(benchmark, one_layer, monkeypatch):
    # Dynamo's graphs, run as they are: what is counted is whose results come out.
    compiled = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", compiled)
    model = digits.load_model("outliers")
    recipe = calibrate(
        model,
        digits.calibration_samples(4),
        scheme="w4a8",
        rank=8,
        # Nothing is chosen or searched: what is counted does not depend on it.
        alpha=0.5,
        separation=1.0,
        rounding="nearest",
        clip=False,
        progress=False,
    )
    quantize_(model, masquant_config(recipe))
    # The first of the prompts are of each kind, and one is broken.
    prompts = benchmark.prompts
    monkeypatch.setattr(benchmark, "prompts", lambda count: prompts(count // 2))
    rows = benchmark.measure(model, "w4a8", calls=54, generated=27, threads=4)
    assert len(rows) == 4
    for row in rows:
        assert row.wrong == 0 and row.raised > 0, row
        assert row.p50_ms <= row.p90_ms <= row.p99_ms
        assert math.isfinite(row.resident_growth_mib + row.allocated_error_mib)


class Layers(nn.Module):
    """Two passes through a compiled layer, whose graph adds one more than its code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

        def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            return lambda *args: tuple(y + 1 for y in graph(*args))

        self.layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
        self.layer.compile(backend=backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("eager", [(), (0,), (1,), (0, 1)])
def test_which_passes_ran_without_a_graph_is_found(alone, eager):
    torch._dynamo.reset()
    model = Layers()

    def call(inputs: Any) -> Any:
        first = model(inputs["x"])
        return [first, model(first)]

    inputs = {"x": torch.tensor([3.0])}
    first = 6.0 if 0 in eager else 7.0
    found = alone.made_alone(model, call, inputs, eager)
    assert [y.item() for y in found] == [first, 2 * first + (1 not in eager)]
    assert alone.eager_passes(model, call, inputs, found) == eager
    # Another's result, by the last bit.
    found[1] = torch.nextafter(found[1], torch.tensor(torch.inf))
    assert alone.eager_passes(model, call, inputs, found) is None


def test_growth_is_the_slope_of_the_second_half(memory):
    marks = [(10 * i, memory.Held(i * i, 5 * i, 7)) for i in range(8)]
    _, allocated, blocks = memory.growth(marks)
    assert allocated.per_1000 == pytest.approx(500)
    assert blocks.per_1000 == pytest.approx(0, abs=1e-9)
    # Of 16, 25, 36, 49 at 0.04, 0.05, 0.06, 0.07: by hand, the line's slope is 1100,
    # what is left of it 1, -1, -1, 1, and the slope's error sqrt(4 / 2 / 5e-4).
    resident, _, _ = memory.growth(marks)
    assert resident.per_1000 == pytest.approx(1100)
    assert resident.error == pytest.approx(math.sqrt(4000))


def test_what_is_allocated_is_held(memory):
    before = memory.held()
    kept = torch.ones(64 * 2**20, dtype=torch.uint8)
    during = memory.held()
    assert during.allocated - before.allocated >= kept.nbytes
    # Its difference may be less: malloc may give pages that were resident before.
    assert during.resident >= kept.nbytes
    numbers = [float(i) for i in range(10**5)]
    assert memory.held().blocks - during.blocks >= len(numbers) / 2


def test_broken_requests_raise_after_routing(benchmark):
    made = benchmark.prompts(24)
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


def test_the_committed_result_is_of_a_thousand_calls_and_clean():
    report = json.loads((BENCHMARKS / "results" / "serving_load.json").read_text())
    assert len(report["loads"]) == 8
    for row in report["loads"]:
        assert row["requests"] >= 1000 and row["wrong"] == 0, row
