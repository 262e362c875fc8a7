# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Weights that make up for what was quantized before them."""

import copy

import numpy as np
import pytest
import tiny_models
import torch
from results import assert_same_checkpoint
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, calibrate, masquant_config
from torchao_masquant.learning.learn import BlockTask
from torchao_masquant.options import SolverOptions
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.solver.asymmetric import corrected
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics

WIDTH, OUT = 6, 5
COUNTS = (40, 30)


def streams(seed=0, drift=0.1):
    """Tokens of two modalities in the quantized stream and in the exact one, float64."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(WIDTH, WIDTH))
    x = [draw.normal(size=(n, WIDTH)) + m for m, n in enumerate(COUNTS)]
    return x, [rows + drift * (rows @ mix) + 0.3 for rows in x]


def observed(x, exact, dtype=torch.float64):
    statistics = InputStatistics(
        WIDTH, ("text", "vision"), torch.device("cpu"), True, drifts=True
    )
    ids = torch.cat([torch.full((len(rows),), m) for m, rows in enumerate(x)])
    rows, exact = (
        torch.tensor(np.concatenate(part), dtype=dtype) for part in (x, exact)
    )
    # Calls of any size, tokens of both mixed, and padding that is left out.
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    for part in order.split(17):
        more = torch.full((2, WIDTH), 1e6, dtype=dtype)
        statistics.update(
            "linear",
            torch.cat((rows[part], more)),
            torch.cat((ids[part], torch.tensor([-1, -1]))),
            exact=torch.cat((exact[part], -more)),
        )
    return statistics


def reference(weight, x, exact, factor):
    """The same from regressions on the tokens themselves, and the biases."""
    total = sum(len(rows) for rows in x)

    def about_means(parts):
        # What a modality weighs: here its tokens, for none is ten times as loud.
        rows = np.concatenate([rows - rows.mean(0) for rows in parts])
        return rows / np.sqrt(total)

    met, wanted = about_means(x), about_means(exact)
    drift = wanted - met
    ridge = np.diag(np.sqrt(((met**2).sum(0) / factor**2).mean()) * factor)
    told = np.linalg.lstsq(
        np.concatenate((wanted, ridge)),
        np.concatenate((drift, np.zeros_like(ridge))),
        rcond=None,
    )[0]
    # Half of what the exact tokens do not tell of those that are met.
    untold = 0.5 * drift.T @ (drift - wanted @ told)
    solution = np.linalg.solve(
        met.T @ met + ridge**2 - untold, met.T @ wanted + ridge**2
    )
    solution = weight @ solution.T
    means = [(e.mean(0) @ weight.T) - s.mean(0) @ solution.T for s, e in zip(x, exact)]
    return solution, np.stack(means)


def factor_of(x, weight):
    """SmoothQuant's exponent, of root mean squares over modalities, about their means."""
    own = np.stack([np.sqrt(((rows - rows.mean(0)) ** 2).mean(0)) for rows in x])
    sizes = np.sqrt((weight**2).mean(0))
    energies = (own**2 * sizes**2).sum(1, keepdims=True)
    return np.sqrt(np.sqrt((own**2 / energies).mean(0) * energies.mean()) / sizes)


@pytest.mark.parametrize("case", ["any", "a channel of zeros", "a constant channel"])
def test_it_is_the_solution_of_two_regressions(case):
    x, exact = streams()
    for part in (*x, *exact):
        if case == "a channel of zeros":
            part[:, 2] = 0
        if case == "a constant channel":
            part[:, 2] = 7
    weight = np.random.default_rng(1).normal(size=(OUT, WIDTH)).astype(np.float32)
    found = corrected(
        {"linear": torch.tensor(weight)}, observed(x, exact), SolverOptions()
    )
    factor = factor_of(x, weight.astype(np.float64))
    if case != "any":
        # It has no variance: what it is divided by decides nothing but its own ridge.
        factor[2] = np.median(np.delete(factor, 2))
    expected, biases = reference(weight.astype(np.float64), x, exact, factor)
    ours = found.weights["linear"].double().numpy()
    # Rounded to float32 once.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    assert np.abs(expected - weight).max() > 0.01
    # The solution gives the mean of what it is solved for; the rest of the exact mean:
    np.testing.assert_allclose(found.biases["linear"].numpy(), biases, atol=1e-5)


def test_what_rounding_adds_to_the_stream_shrinks_weights_half_as_much():
    """Of tokens that are not correlated with it, and whose channels are not either."""
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 2 * WIDTH)))[0]
    orthogonal = np.linalg.qr(orthogonal - orthogonal.mean(0))[0] * 8
    exact, noise = orthogonal[:, :WIDTH], 0.5 * orthogonal[:, WIDTH:]
    weight = torch.eye(WIDTH)
    found = corrected(
        {"linear": weight}, observed([exact + noise] * 2, [exact] * 2), SolverOptions()
    )
    # Variances are 1 and 1/4, and the ridge is 5/4.
    expected = (1 + 1.25) / (1 + 0.25 / 2 + 1.25) * weight
    torch.testing.assert_close(found.weights["linear"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["lost", "new", "turned", "few", "other"])
def test_no_drift_makes_it_more_than_twice_the_least_squares_solution(case):
    draw = np.random.default_rng(0)
    count = 4 if case == "few" else 100
    x = draw.normal(size=(count, WIDTH))
    exact = x + 0.1 * draw.normal(size=x.shape)
    if case == "lost":
        exact[7, 2] = 1e4
    if case == "new":
        x[7, 2] = 1e4
    if case == "turned":
        exact = -x
    if case == "other":
        exact = 100 * draw.normal(size=x.shape)
    weight = torch.eye(WIDTH)
    found = corrected(
        {"linear": weight}, observed([x, x], [exact, exact]), SolverOptions()
    )
    met, wanted = x - x.mean(0), exact - exact.mean(0)
    factor = factor_of([x, x], np.eye(WIDTH))
    squares = (met**2).mean(0)
    ridge = np.diag((squares / factor**2).mean() * factor**2)
    covariance = met.T @ met / count + ridge
    least = (wanted.T @ met / count + ridge) @ np.linalg.inv(covariance)
    # As far as each reaches, measured by tokens: (C - V / 2 + R) is at least half (C + R).
    lower = np.linalg.cholesky(covariance)
    ours, least = (
        np.linalg.norm(w @ lower, 2)
        for w in (found.weights["linear"].double().numpy(), least)
    )
    assert ours <= 2 * least * 1.01


@pytest.mark.parametrize("low_rank_bits", [16, 8])
def test_the_mean_of_each_modality_is_exact(low_rank_bits):
    x, exact = streams()
    options = SolverOptions(
        scheme="w4a16", group_size=6, rank=2, low_rank_bits=low_rank_bits
    )
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    statistics = observed(x, exact)
    found = corrected({"linear": weight}, statistics, options)
    layer = found.applied(solve_group(found.weights, statistics, options))["linear"]
    quantized = layer.quantize(
        weight, options.number_format, statistics.modalities, low_rank_bits
    )
    for index, (rows, wanted) in enumerate(zip(x, exact)):
        ids = torch.full((len(rows),), index)
        y = torch.ops.masquant.linear(torch.tensor(rows).float(), quantized, ids, None)
        wanted = torch.tensor(wanted.mean(0)) @ weight.double().t()
        torch.testing.assert_close(y.double().mean(0), wanted, rtol=0, atol=1e-5)


def test_what_did_not_drift_is_left_as_it_is():
    x, _ = streams()
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    found = corrected({"linear": weight}, observed(x, x), SolverOptions())
    assert torch.equal(found.weights["linear"], weight)
    assert not found.biases["linear"].any()
    # Nor where nothing is read, whatever was to be.
    silent = [np.zeros_like(rows) for rows in x]
    found = corrected({"linear": weight}, observed(silent, x), SolverOptions())
    assert torch.equal(found.weights["linear"], weight)
    means = torch.tensor(np.stack([rows.mean(0) for rows in x]))
    torch.testing.assert_close(found.biases["linear"], means @ weight.double().t())


def test_what_overflows_in_either_stream_is_refused():
    for number in (0, 1):
        both = streams()
        both[number][1][4, 2] = np.inf
        with pytest.raises(ValueError, match="nan or inf in vision tokens"):
            observed(*both)


def test_a_sink_does_not_move_the_bias():
    """One token a thousand times as loud, which the earlier linears have changed much."""
    x, exact = streams(drift=0.0)
    x[0][3] *= 1000
    exact[0][3] = 2 * x[0][3]
    weight = torch.eye(WIDTH)
    found = corrected({"linear": weight}, observed(x, exact), SolverOptions())
    others = np.delete(exact[0] - x[0], 3, axis=0).mean(0)
    bias = found.biases["linear"][0].numpy()
    change = np.delete(x[0], 3, axis=0).mean(0) @ (
        np.eye(WIDTH) - found.weights["linear"].double().numpy().T
    )
    np.testing.assert_allclose(bias, others + change, atol=1e-6)


@pytest.fixture
def model():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def samples():
    return tiny_models.samples(audio=True)


@torch.no_grad()
def divergence(model, dense, samples):
    found = []
    for sample in samples:
        p, q = (m(**sample).logits.double().log_softmax(-1) for m in (dense, model))
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
    return sum(found) / len(found)


@pytest.mark.parametrize("scheme, rank", [("w4a8", 0), ("w4a4", 2), ("nvfp4", 0)])
def test_answers_are_nearer_to_the_dense_model_s(model, samples, scheme, rank):
    options = dict(scheme=scheme, rank=rank, progress=False)
    found = {}
    for asymmetric in (False, True):
        recipe = calibrate(model, samples, asymmetric_calibration=asymmetric, **options)
        quantized = copy.deepcopy(model)
        quantize_(quantized, masquant_config(recipe))
        found[asymmetric] = divergence(quantized, model, samples)
        assert recipe.options.asymmetric_calibration is asymmetric
        assert recipe.description["tokens"]["audio"] == 16
    assert found[True] < 0.8 * found[False]


def test_a_model_in_16_bits_and_samples_that_are_read_once(model, samples):
    model.bfloat16()
    samples = [
        {n: v.bfloat16() if v.is_floating_point() else v for n, v in s.items()}
        for s in samples
    ]
    before = copy.deepcopy(model.state_dict())
    recipe = calibrate(
        model, iter(samples), asymmetric_calibration=True, epochs=1, low_rank_bits=8
    )
    assert set(recipe.options.stored()) >= {"asymmetric_calibration", "epochs"}
    # It is as it was, and the recipe fits it.
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all("forward" not in vars(m) and type(m) is nn.Linear for m in linears)
    quantize_(model, masquant_config(recipe))


def test_an_error_leaves_the_model_as_it_was(model, samples):
    broken = [dict(samples[0]), *samples[1:]]
    broken[0]["input_features"] = broken[0]["input_features"] * float("nan")
    with pytest.raises(ValueError, match="nan or inf in audio tokens"):
        calibrate(model, broken, asymmetric_calibration=True)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all("forward" not in vars(m) and type(m) is nn.Linear for m in linears)
    assert not any(m._forward_hooks for m in linears)


def test_what_it_is_not_for_is_refused_before_anything_runs(tmp_path):
    def untouched():
        raise AssertionError("the samples were asked for")
        yield

    options = dict(asymmetric_calibration=True)
    experts = tiny_models.qwen3_vl_moe()
    with pytest.raises(ValueError, match="linears alone, and .* is of experts: .*=Fal"):
        calibrate(experts, untouched(), **options)
    with pytest.raises(ValueError, match="decoder's blocks alone, and model.vis"):
        calibrate(tiny_models.qwen25_vl(), untouched(), towers="w8a8", **options)
    with pytest.raises(ValueError, match="needs the samples: call calibrate"):
        MASQuantConfig(step="prepare", **options)
    with pytest.raises(ValueError, match="no nn.ModuleList of PlainModel holds all"):
        calibrate(tiny_models.PlainModel(), untouched(), **options)


def test_an_interrupted_run_goes_on_where_it_was(model, samples, tmp_path, monkeypatch):
    from torchao_masquant.sequential.writer import Writer

    model.save_pretrained(tmp_path / "model")
    options = dict(asymmetric_calibration=True, rank=0, progress=False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate_sequential(tmp_path / "model", samples, output=whole, **options)
    write = Writer.write

    def until_the_second(self, index, layers):
        if index:
            raise KeyboardInterrupt
        write(self, index, layers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", until_the_second)
        calibrate_sequential(tmp_path / "model", samples, output=parts, **options)
    done = calibrate_sequential(tmp_path / "model", samples, output=parts, **options)
    assert done.resumed == 1
    assert_same_checkpoint(whole, parts)


class Block(nn.Module):
    def __init__(self, second, is_first):
        super().__init__()
        # Read in another order than they are made in.
        self.last = nn.Linear(32, 32)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.of_second, self.is_first = second, is_first

    def forward(self, hidden, shared):
        inner = self.of_second(self.second, torch.tanh(self.first(hidden)))
        # As layers that share keys and values do.
        if self.is_first:
            shared["kept"] = inner
        return hidden + self.last(inner + shared["kept"])


class Blocks(nn.Module):
    """Two blocks on tokens of two modalities, which samples tell."""

    def __init__(self, second=lambda linear, x: linear(x)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(second, True), Block(second, False)])

    def forward(self, x):
        shared = {}
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


def of_blocks(model, told=3, **options):
    """A recipe, from samples of which the first say what they are."""
    draw = torch.Generator().manual_seed(0)
    samples = [{"x": torch.randn(2, 10, 32, generator=draw)} for _ in range(3)]
    for sample in samples[:told]:
        sample["modality_ids"] = torch.randint(0, 2, (2, 10), generator=draw)
    given = dict(modalities=("text", "vision"), rank=0, scheme="w4a8", progress=False)
    options = {"asymmetric_calibration": True, **given, **options}
    return calibrate(model, samples, **options)


def test_inputs_are_met_in_the_order_of_their_calls():
    """Whichever order the model has its linears in."""
    found = of_blocks(Blocks())
    model = Blocks()
    for block in model.layers:
        block._modules["last"] = block._modules.pop("last")
    same = of_blocks(model)
    assert list(found.layers) != list(same.layers)
    for name, layer in found.layers.items():
        assert torch.equal(layer.qdata, same.layers[name].qdata), name


def test_what_meets_other_tokens_is_left_out_and_named_once(caplog):
    found = of_blocks(Blocks(lambda linear, x: x + linear(x.mean(1, keepdim=True))))
    assert not [name for name in found.layers if "second" in name]
    (told,) = [m for m in caplog.messages if "other tokens" in m]
    assert "layers.*.second (2)" in told


def test_what_has_no_one_input_is_refused():
    with pytest.raises(ValueError, match="layers.0.second is called more than once"):
        of_blocks(Blocks(lambda linear, x: linear(linear(x))))
    with pytest.raises(RuntimeError, match="modality of its tokens is not known"):
        of_blocks(Blocks(), told=1)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_what_blocks_share_stays_in_its_stream(monkeypatch, asymmetric):
    targets = []
    monkeypatch.setattr(
        BlockTask,
        "learn",
        lambda self, inputs, outputs: targets.append(outputs) or self.layers,
    )
    model, seen = Blocks(), []
    handle = model.layers[1].register_forward_hook(lambda *a: seen.append(a[-1]))
    of_blocks(model, epochs=1, asymmetric_calibration=asymmetric)
    handle.remove()
    # In full precision, where one does not show what reads what, the samples come first.
    for output, wanted in zip(targets[1], seen[0 if asymmetric else 1 :]):
        assert torch.equal(output, wanted)
