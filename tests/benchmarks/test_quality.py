# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The quality benchmark and its baselines."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hadamard_oracle import hadamard_f64
from tiny_models import OMNI_DECODER
from torch import nn

from torchao_masquant import tensor_subclasses
from torchao_masquant.options import SolverOptions, get_scheme
from torchao_masquant.routing import Router
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.smoothing import WeightSizes, smoothing_factor
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.testing import digits

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
def test_quick(one_layer, tmp_path, capsys, monkeypatch):
    # A quarter of the calibration data.
    few = digits.calibration_samples(32)
    monkeypatch.setattr(digits, "calibration_samples", lambda: few)
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
        (
            ["--variant", "plain", "--seeds", "1"],
            "there is no seed 1 of variant 'plain'",
        ),
        (
            ["--checkpoints", "nowhere"],
            "nowhere is no checkpoint: it has no config.json",
        ),
        (["--rank", "5"], "--rank is a share of min(N, K), 0 to 1, got 5."),
        (["--examples", "0"], "--examples must be 2 to 200, got 0."),
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


def test_pooled_moments_are_those_of_all_tokens():
    from baselines.pooled import pooled_statistics

    data, _, statistics = _problem()
    none, every = pooled_statistics(statistics).moments
    x = torch.cat(data).double()
    expected = torch.from_numpy(np.cov(x.numpy().T, ddof=0))
    for moments in (none, every):
        assert moments.count == 270
        torch.testing.assert_close(moments.amin, x.amin(0))
        torch.testing.assert_close(moments.amax, x.amax(0))
        torch.testing.assert_close(moments.mean(), x.mean(0))
        torch.testing.assert_close(moments.covariance(), expected)
    # As many sampled tokens of each modality as it has of all.
    kept = {tuple(row) for row in every.sample.tolist()}
    shares = [sum(tuple(r) in kept for r in d.tolist()) for d in data]
    assert shares == [90, 90, 90] and len(every.sample) == 270


def test_pooled_samples_are_in_proportion():
    from baselines.pooled import pooled_statistics

    statistics = InputStatistics(2, NAMES, torch.device("cpu"), True)
    for index, count in enumerate((1000, 40, 0)):
        x = torch.full((count, 2), float(index))
        statistics.update("q", x, torch.full((count,), index))
    moments = pooled_statistics(statistics).moments[1]
    # 256 of 1000 are sampled: 10 of 40.
    counts = [(moments.sample[:, 0] == index).sum().item() for index in range(2)]
    assert counts == [256, 10]


@pytest.mark.parametrize("size, rotated_by", [(None, 8), (1, None), (2, 2)])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@torch.no_grad()
def test_pooled_treats_all_tokens_alike(scheme, size, rotated_by):
    from baselines.pooled import PooledLinear, pooled

    data, linear, statistics = _problem()
    weight, bits = linear.weight.data, get_scheme(scheme)
    if bits.group_size is not None:
        bits = dataclasses.replace(bits, group_size=K)
    options = SolverOptions(
        scheme, rank=2, group_size=bits.group_size, hadamard_size=size
    )
    layer = pooled({"q": weight}, statistics, options)["q"]
    assert layer.hadamard_size == rotated_by
    module = PooledLinear(linear, layer, bits)
    # The bytes of ours, with two other modalities: a rank of 2 each.
    assert layer.ranks == (4,)
    x = torch.cat(data)
    ids = torch.arange(3).repeat_interleave(90)
    y = module.routed(x, ids)
    assert torch.equal(y, module(x)) and torch.equal(y, module.routed(x, ids.flip(0)))
    tensor = module.weight
    z = 0 if tensor.act_shift is None else tensor.act_shift[1].double()
    v = x.double() * tensor.act_pre_scale[1].double() - z
    v = v @ torch.from_numpy(hadamard_f64(K, rotated_by))
    if bits.act_bits < 16:
        step = v.abs().amax(1, keepdim=True) / (2 ** (bits.act_bits - 1) - 0.5)
        v = (v / step).round() * step
    levels = tensor.int_data().double()
    if tensor.zero_point is not None:
        levels = levels - tensor.zero_point.double()
    met = (levels * tensor.scale.double()).t() + tensor.l1.double() @ tensor.l2.double()
    expected = v @ met + tensor.modality_bias[1].double()
    exact = x.double() @ weight.double().t()
    # The formula, to within what rounding activations a little differently may change.
    assert (y - expected).norm() < 0.02 * exact.norm()
    assert (y - exact).norm() < 0.1 * exact.norm()
    # Nothing is counted twice: integers, scale, zero point, pair, factor, shift, bias.
    inner = (tensor.qdata, tensor.scale, tensor.zero_point, tensor.l1, tensor.l2)
    size = sum(t.nbytes for t in inner if t is not None)
    size += 4 * (K + 16) + (4 * K if tensor.act_shift is not None else 0)
    assert module.nbytes_stored == size


def test_sensitivity_of_an_input_is_that_of_its_own_linears():
    from baselines.mbq import input_sensitivity

    model = digits.load_model("outliers")
    layers = f"{OMNI_DECODER}.layers"
    groups = {
        f"{layers}.0.mlp.down_proj": [f"{layers}.0.mlp.down_proj"],
        f"{layers}.2.mlp.gate_proj": [
            f"{layers}.2.mlp.gate_proj",
            f"{layers}.2.mlp.up_proj",
        ],
    }
    sample = next(
        s
        for s in digits.calibration_samples()
        if "pixel_values" in s and "input_features" in s
    )
    found = input_sensitivity(model, [sample], groups)
    assert list(found) == list(groups)
    # Gradients of the same loss, taken with respect to the outputs by name.
    outputs = {}
    for name in sum(groups.values(), []):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: outputs.update({name: y})
        )
    logits = model(**sample).logits[0]
    loss = torch.nn.functional.cross_entropy(
        logits, logits.detach().argmax(-1), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    gradients = dict(zip(outputs, gradients))
    ids = Router.for_model(model).ids_of(sample["input_ids"])[0]
    for leader, names in groups.items():
        sizes = torch.cat([gradients[name][0].abs() for name in names], dim=1).double()
        means = [sizes[ids == index].mean().item() for index in range(3)]
        expected = [3 * mean / sum(means) for mean in means]
        assert found[leader] == pytest.approx(expected, rel=1e-3)


def test_the_cache_is_keyed_by_code_and_weights(tmp_path):
    script = runpy.run_path(str(BENCHMARKS / "quality.py"))
    fingerprint = script["_model_fingerprint"]
    assert fingerprint(None, "outliers") != fingerprint(None, "plain")
    seeds = [fingerprint(path, "") for path in sorted(script["SEEDS"].iterdir())]
    assert len({*seeds, fingerprint(None, "outliers")}) == len(seeds) + 1
    from baselines.fingerprint import code_fingerprint

    before = code_fingerprint()
    (tmp_path / "new.py").write_text("changed = True\n")
    tensor_subclasses.__path__.insert(0, str(tmp_path))
    try:
        assert code_fingerprint() != before
    finally:
        tensor_subclasses.__path__.pop(0)
    assert code_fingerprint() == before


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
def test_the_authors_pair_reads_what_is_not_rounded():
    """Where what is deployed reads the rounded activations, one modality at a time."""
    from baselines.published import PublishedLinear

    data, linear, statistics = _problem()
    options = SolverOptions("w4a4", "masquant-paper", rank=4)
    (layer,) = solve_group({"q": linear.weight.data}, statistics, options).values()
    router = Router(NAMES)
    module = PublishedLinear("q", linear, layer, options.number_format, NAMES, router)
    bare = dataclasses.replace(layer, ranks=(), l1=None, l2=None)
    weight = bare.quantize(linear.weight.data, options.number_format, NAMES)
    for index, x in enumerate(data):
        ids = torch.full((len(x),), index)
        expected = torch.ops.masquant.linear(x, weight, ids, None)
        if index:
            own = slice(4 * (index - 1), 4 * index)
            smoothed = x / layer.smoothing_factor[index]
            pair = layer.l1[:, own].float() @ layer.l2[own].float()
            expected = expected + smoothed @ pair
        found = module.routed(x, ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    pairs = layer.l1.nbytes + layer.l2.nbytes
    assert module.nbytes_stored == weight.nbytes_stored + pairs
    mixed = torch.cat([x[:5] for x in data])
    ids = torch.arange(3).repeat_interleave(5)
    rows = [module.routed(x[:5], torch.full((5,), i)) for i, x in enumerate(data)]
    torch.testing.assert_close(module.routed(mixed, ids), torch.cat(rows))


@pytest.mark.parametrize("scheme", ["w4a4", "fp8"])
@torch.no_grad()
def test_svdquant_rounds_what_the_largest_components_leave(scheme):
    from baselines.svdquant import SvdQuantLinear

    data, linear, _ = _problem()
    bits, x = get_scheme(scheme), torch.cat(data)
    factor = torch.rand(K, dtype=torch.float64) + 0.5
    module = SvdQuantLinear(linear, factor, bits, rank=3)
    smoothed = linear.weight.double() * factor
    u, sizes, v = np.linalg.svd(smoothed.numpy(), full_matrices=False)
    pair = (module.l1.double() @ module.l2.double()).t()
    best = torch.from_numpy(u[:, :3] * sizes[:3] @ v[:3])
    # bfloat16 halves.
    torch.testing.assert_close(pair, best, rtol=0, atol=0.02 * sizes[0])
    # The pair reads what is not rounded, and the rest what is.
    rest = torch.ops.masquant.linear(x, module.weight, None, None)
    expected = rest + (x.double() / factor) @ pair.t()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-3)
    met = module.weight.dequantize(torch.float32).double() * factor
    assert (met + pair - smoothed).norm() < 0.1 * (smoothed - best).norm()
    assert module.nbytes_stored == module.weight.nbytes_stored + 2 * 3 * (K + 16)


@torch.no_grad()
def test_svdquant_takes_the_exponent_of_the_least_error():
    from baselines.svdquant import SvdQuantLinear, svdquant

    data, linear, statistics = _problem()
    bits, x = get_scheme("w4a4"), torch.cat(data)
    ranges = x.abs().amax(0)
    sizes = WeightSizes.of({"q": linear.weight.data})
    exact, errors = linear(x), []
    for exponent in (0.1, 0.3, 0.5, 0.7, 0.9):
        factor = smoothing_factor(ranges, sizes.absmax, exponent)
        found = SvdQuantLinear(linear, factor, bits, rank=3)
        errors.append((found(x) - exact).norm().item())
    assert max(errors) > 1.1 * min(errors)
    (chosen,) = svdquant([linear], statistics, bits, rank=3)
    assert (chosen(x) - exact).norm().item() == pytest.approx(min(errors), rel=1e-5)


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
        (step,) = [
            i
            for i, factor in enumerate(factors)
            if torch.allclose(found.smoothing_factor[0], factor, rtol=1e-4, atol=0)
        ]
        # Factors equal to rounding still flip one of the 4-bit integers now and then, of
        # which there are 90 * 24: two exponents may change places, but not two errors.
        assert sizes[step] <= min(sizes) * (1 + 5e-3)
