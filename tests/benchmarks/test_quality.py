# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The quality benchmark and its baselines."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchao_masquant.calibration.statistics import InputStatistics
from torchao_masquant.routing import Router
from torchao_masquant.schemes import get_scheme
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.methods import SolverOptions

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("text", "vision", "audio")
K = 24


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    """A script finds the folder beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    statistics = InputStatistics(K, NAMES, torch.device("cpu"), True)
    data = []
    for index in range(3):
        scales = torch.exp(torch.randn(K, generator=generator))
        data.append(torch.randn(90, K, generator=generator) * scales + index)
        statistics.update("q", data[-1], torch.full((90,), index))
    linear = nn.Linear(K, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, K, generator=generator))
    return data, linear, statistics


def _smoothquant(linear, statistics, scheme):
    options = SolverOptions(scheme, "smoothquant")
    return solve_group({"q": linear.weight.data}, statistics, options)


@torch.no_grad()
def test_quick(tmp_path, capsys):
    report = tmp_path / "quality.json"
    main = runpy.run_path(str(BENCHMARKS / "quality.py"))["main"]
    methods = ["--methods", "smoothquant", "control", "gptq", "awq", "mas-unshared"]
    arguments = ["--quick", "--json", str(report), "--cache", str(tmp_path / "rows")]
    assert main([*arguments, *methods]) == 0
    rows = json.loads(report.read_text())["rows"]
    found = {row["method"]: row for row in rows}
    assert list(found) == ["", *methods[1:]]
    for name, row in found.items():
        assert row["variant"] == "outliers" and row["seed"] == 0
        assert set(row["tasks"]) == {"image", "audio", "both", "text"}
        assert all(0 <= t["accuracy"] <= 1 for t in row["tasks"].values())
        assert (row["scheme"], bool(row["sqnr"])) == (
            ("w4a8", True) if name else ("dense", False)
        )
    # 4 bits of 16, with factors; a pair more; three weights.
    dense, one = found[""]["bytes"], found["smoothquant"]["bytes"]
    assert 0.25 < one / dense < 0.27
    assert one == found["gptq"]["bytes"] < found["control"]["bytes"]
    assert found["mas-unshared"]["bytes"] == 3 * one
    for better, than in (("gptq", "smoothquant"), ("control", "smoothquant")):
        assert found[better]["sqnr"]["text"] > found[than]["sqnr"]["text"] + 3
    # A second run reads what the first has kept.
    monkey = capsys.readouterr()
    assert "w4a8" in monkey.out
    assert main([*arguments, *methods]) == 0
    assert json.loads(report.read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "smothquant"], "unknown method 'smothquant': choose from"),
        (["--schemes", "w5a5"], "invalid choice: 'w5a5'"),
        (["--json", "nowhere/x.json"], "there is no folder nowhere to write to."),
    ],
)
def test_a_typo_is_named(arguments, message, capsys):
    main = runpy.run_path(str(BENCHMARKS / "quality.py"))["main"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@torch.no_grad()
def test_gptq_has_the_smaller_error_of_all_tokens(scheme):
    from baselines.gptq import gptq

    data, linear, statistics = _problem()
    bits, weight = get_scheme(scheme), linear.weight.data
    plain = _smoothquant(linear, statistics, scheme)
    layers = gptq({"q": weight}, statistics, plain, bits)
    x = torch.cat(data).double()

    def error(layer):
        met = layer.quantize(weight, bits, NAMES).dequantize(torch.float32).double()
        return (x @ (met - weight.double()).t()).square().sum().item()

    assert torch.equal(layers["q"].smoothing_factor, plain["q"].smoothing_factor)
    assert error(layers["q"]) < error(plain["q"])


@torch.no_grad()
def test_control_repairs_all_tokens_by_the_best_pair():
    from baselines.control import ControlLinear

    data, linear, statistics = _problem()
    bits = get_scheme("w4a8")
    plain = _smoothquant(linear, statistics, "w4a8")["q"]
    module = ControlLinear(linear, plain, statistics, bits, 3)
    x = torch.cat(data).double()
    met = plain.quantize(linear.weight.data, bits, ("text",)).dequantize(torch.float32)
    target = x @ (linear.weight.double() - met.double()).t()
    centered = (target - target.mean(0)).numpy()
    tail = np.linalg.svd(centered, compute_uv=False)[3:]
    weight = module.weight
    pair = weight.l1.double() @ weight.l2.double()
    left = target - (x / plain.smoothing_factor.double()) @ pair
    left = left - weight.modality_bias[1].double()
    # bfloat16 halves.
    size = np.linalg.norm(centered)
    assert left.norm().item() == pytest.approx(np.linalg.norm(tail), abs=0.02 * size)
    y = module(data[0])
    assert (y - linear(data[0])).norm() < 0.1 * linear(data[0]).norm()


@torch.no_grad()
def test_each_modality_has_a_weight_of_its_own():
    from baselines.unshared import UnsharedLinear

    data, linear, statistics = _problem()
    factors = torch.rand(3, K) + 0.5
    bits = get_scheme("w4a8")
    router = Router(NAMES)
    module = UnsharedLinear("q", linear, factors, bits, router)
    x = torch.cat([d[:5] for d in data])
    ids = torch.arange(3).repeat_interleave(5)
    with router.explicit(ids[None]):
        y = module(x[None])[0]
    for index, weight in enumerate(module.weights):
        rows = ids == index
        expected = torch.ops.masquant.linear(x[rows], weight, None, None)
        assert torch.equal(y[rows], expected)
        torch.testing.assert_close(weight.smoothing_factor[0], factors[index])


@torch.no_grad()
def test_search_finds_the_exponent():
    from baselines.search import searched_factor

    data, linear, statistics = _problem()
    bits, weight = get_scheme("w4a4"), linear.weight.data
    magnitude = torch.cat(data).abs().mean(0)

    def error(factor, index=None):
        tensor = _smoothquant(linear, statistics, "w4a4")["q"]
        tensor.smoothing_factor = factor[None]
        tensor = tensor.quantize(weight, bits, NAMES)
        x = torch.cat(data) if index is None else data[index]
        return (torch.ops.masquant.linear(x, tensor, None, None) - x @ weight.t()).abs()

    factors = []
    for step in range(20):
        factor = magnitude ** (step / 20)
        factors.append(factor / (factor.max() * factor.min()).sqrt())
    squares = [error(f).square().mean().item() for f in factors]
    found = searched_factor({"q": weight}, statistics, bits)["q"].smoothing_factor[0]
    best = factors[int(np.argmin(squares))]
    torch.testing.assert_close(found, best, rtol=1e-4, atol=0)
    # All the weight on one modality: the best exponent for that one.
    for index in range(3):
        balance = [float(i == index) for i in range(3)]
        found = searched_factor({"q": weight}, statistics, bits, balance)["q"]
        sizes = [error(f, index).mean().item() for f in factors]
        best = factors[int(np.argmin(sizes))]
        torch.testing.assert_close(found.smoothing_factor[0], best, rtol=1e-4, atol=0)


def teardown_module():
    # Beside the script they are top-level modules; nothing else should find them.
    for name in [n for n in sys.modules if n.split(".")[0] == "baselines"]:
        del sys.modules[name]
