# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``analyze`` against float64 formulas written out here."""

import math

import numpy as np
import pytest
import tiny_models
import torch

from torchao_masquant import SCHEMES, Analysis, analyze
from torchao_masquant.evaluation.compensation_curves import effective_rank
from torchao_masquant.evaluation.smoothing_loss import activation_sqnr
from torchao_masquant.evaluation.token_session import TokenSession
from torchao_masquant.solver.compensation import low_rank_pair
from torchao_masquant.solver.modality_spread import MUCH
from torchao_masquant.testing import digits

MODALITIES = ("text", "vision", "audio")
RANKS = (0.0, 0.25, 0.5)


def _data(samples=4, rows=3, length=20):
    generator = torch.Generator().manual_seed(1)
    loudness = torch.ones(3, 16)
    loudness[1, 2], loudness[2, 5:7], loudness[0, 9] = 30.0, 20.0, 5.0
    data = []
    for _ in range(samples):
        ids = torch.randint(0, 3, (rows, length), generator=generator)
        x = torch.randn(rows, length, 16, generator=generator) * loudness[ids]
        # A mean too, so that centring matters; and a channel that no token uses.
        x = x + loudness[ids]
        x[..., 0] = 0
        data.append({"x": x, "modality_ids": ids})
    return data


@pytest.fixture(scope="module")
def model():
    return tiny_models.PlainModel()


@pytest.fixture(scope="module", params=["w4a8", "w8a8", "w4a4"])
def analysis(request, model):
    return analyze(
        model,
        _data(),
        scheme=request.param,
        ranks=RANKS,
        modalities=MODALITIES,
        progress=False,
    )


class Expected:
    """One linear of PlainModel, in numpy."""

    def __init__(self, model, name, scheme, alpha=0.5):
        linear = model.get_submodule(name)
        self.weight = linear.weight.detach().double().numpy()
        x = torch.cat([s["x"].flatten(0, 1) for s in _data()])
        ids = torch.cat([s["modality_ids"].flatten() for s in _data()])
        if name == "second":
            x = torch.tanh(model.first(x)).detach()
        self.tokens = [x[ids == i].double().numpy() for i in range(3)]
        self.absmax = np.stack([np.abs(t).max(0) for t in self.tokens])
        self.alpha = alpha
        self.own = [self._factor(a) for a in self.absmax]
        self.unified = self._factor(self.absmax.max(0))
        self.bits = SCHEMES[scheme]
        self.shared = self._quantized_weight()

    def _factor(self, absmax):
        w = np.abs(self.weight).max(0)
        factor = absmax**self.alpha / w ** (1 - self.alpha)
        used = absmax > 0
        # torch.median: the lower one of an even number.
        filling = np.sort(factor[used])[(used.sum() - 1) // 2]
        return np.where(used, factor, filling)

    def _quantized_weight(self):
        # In float32, as torchao does: a row's largest weight is a tie, 7.5 steps.
        smoothed = self.weight.astype(np.float32) / (1 / self.own[0].astype(np.float32))
        levels = 2**self.bits.weight_bits
        scale = np.abs(smoothed).max(1, keepdims=True) / np.float32((levels - 1) / 2)
        steps = np.round(smoothed * (1 / scale))
        steps = np.clip(steps, -levels // 2, levels // 2 - 1)
        return (steps * scale).astype(np.float64)

    def sqnr(self, index, factor):
        x = self.tokens[index]
        smoothed = x / factor
        top = 2 ** (self.bits.act_bits - 1) - 1
        step = np.abs(smoothed).max(1, keepdims=True) / top
        x_hat = np.round(smoothed / step) * step * factor
        return 10 * np.log10((x**2).sum() / ((x_hat - x) ** 2).sum())

    def covariance(self, index, centered):
        x = self.tokens[index]
        return np.cov(x.T, bias=True) if centered else x.T @ x / len(x)


def _root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _entropy_rank(matrix):
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = energies / energies.sum()
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("name", ["first", "second"])
def test_ranges_and_dominance(model, analysis, name):
    expected = Expected(model, name, analysis.scheme)
    largest = expected.absmax.max(0)
    # tanh() of large values is 1 for two modalities: each wins half of such a channel.
    wins = (expected.absmax == largest)[:, largest > 0]
    shares = (wins / wins.sum(0)).mean(1)
    found = analysis.inputs[name]
    assert found.linears == (name,) and found.in_features == len(expected.absmax[0])
    for index, modality in enumerate(MODALITIES):
        ranges, absmax = found.ranges[modality], expected.absmax[index]
        assert ranges.tokens == len(expected.tokens[index])
        assert ranges.absmax == pytest.approx(absmax.max())
        assert ranges.median == pytest.approx(np.median(absmax))
        assert ranges.low == pytest.approx(np.quantile(absmax, 0.05))
        assert ranges.high == pytest.approx(np.quantile(absmax, 0.95))
        assert ranges.dominance == pytest.approx(shares[index])
    assert sum(r.dominance for r in found.ranges.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_loss_foretold_and_measured(model, analysis, name):
    expected = Expected(model, name, analysis.scheme)
    for index, modality in enumerate(MODALITIES):
        loss = analysis.inputs[name].losses[modality]
        own, unified = expected.own[index], expected.unified
        absmax = expected.absmax[index]
        used = absmax > 0
        # The theorem's own terms: alpha times the ratio of the ranges, in dB.
        ratio = expected.absmax.max(0)[used] / absmax[used]
        assert loss.predicted == pytest.approx(
            expected.alpha * 20 * np.log10(ratio).mean(), abs=1e-6
        )
        noise = [
            ((absmax / s)[used].max() ** 2) * (s[used] ** 2).sum()
            for s in (own, unified)
        ]
        assert loss.predicted_per_token == pytest.approx(
            10 * np.log10(noise[1] / noise[0]), abs=1e-6
        )
        assert loss.tokens == len(expected.tokens[index])
        # The operator rounds in float32: up to 1e-5 of a step, of which the noise is
        # 0.29, and one flipped tie moves the energy by less than that.
        assert loss.own == pytest.approx(expected.sqnr(index, own), abs=2e-3)
        assert loss.unified == pytest.approx(expected.sqnr(index, unified), abs=2e-3)
        assert loss.measured == loss.own - loss.unified


def test_the_loudest_modality_everywhere_loses_nothing(model):
    data = _data()
    for sample in data:
        sample["x"][sample["modality_ids"] == 1] *= 1000
    found = analyze(
        model, data, modalities=MODALITIES, include="first", progress=False
    ).inputs["first"]
    assert found.ranges["vision"].dominance == 1
    assert found.losses["vision"].predicted == pytest.approx(0, abs=1e-12)
    assert found.losses["vision"].measured == 0
    assert found.losses["text"].predicted > 20


@pytest.mark.parametrize("name", ["first", "second"])
def test_effective_ranks(model, analysis, name):
    expected = Expected(model, name, analysis.scheme)
    for index, modality in enumerate(MODALITIES[1:], start=1):
        s = expected.own[index]
        difference = expected.weight * s - expected.shared
        root = _root(expected.covariance(index, False) / np.outer(s, s))
        found = analysis.effective_ranks[name][modality]
        # Float32 scales of the weight's integers; directions below 1e-10 of the
        # covariance are left out.
        close = dict(rel=1e-5)
        assert found.plain == pytest.approx(_entropy_rank(difference), **close)
        assert found.whitened == pytest.approx(
            _entropy_rank(difference @ root), **close
        )
        assert found.full == min(expected.weight.shape)


def _curve(expected, index, method):
    """Centred SQNR by rank, with the pair itself."""
    weight, s = expected.weight, expected.own[index].copy()
    centered = method == "masquant"
    covariance = expected.covariance(index, centered)
    if centered:
        effective = expected.shared / s
        s /= ((effective @ covariance) * weight).sum() / (
            (effective @ covariance) * effective
        ).sum()
    x = expected.tokens[index]
    y = x @ weight.T
    signal = ((y - y.mean(0)) ** 2).sum()
    difference = torch.from_numpy(weight * s - expected.shared)
    smoothed = torch.from_numpy(covariance / np.outer(s, s))
    ratios = []
    for rank in RANKS:
        count = max(1, round(rank * min(weight.shape))) if rank else 0
        pair = low_rank_pair(difference, count, smoothed)
        left = difference if pair is None else difference - (pair[0] @ pair[1]).T
        error = (x / s) @ left.numpy().T
        if centered:
            # What the bias takes.
            error = error - error.mean(0)
        ratios.append(10 * np.log10(signal / (error**2).sum()))
    return ratios


@pytest.mark.parametrize("method", ["masquant-paper", "masquant"])
def test_the_curves_are_those_of_the_pairs(model, analysis, method):
    linears = [Expected(model, n, analysis.scheme) for n in ("first", "second")]
    assert analysis.ranks == RANKS
    for index, modality in enumerate(MODALITIES[1:], start=1):
        curves = [_curve(linear, index, method) for linear in linears]
        found = analysis.sqnr_by_rank[method][modality]
        assert found == pytest.approx(np.mean(curves, 0), abs=1e-3)
        assert list(found) == sorted(found)


def test_the_correlation_is_numpys(analysis):
    losses = [loss for i in analysis.inputs.values() for loss in i.losses.values()]
    predicted, per_token, measured = np.array(
        [(x.predicted, x.predicted_per_token, x.measured) for x in losses]
    ).T
    assert analysis.correlation == pytest.approx(np.corrcoef(predicted, measured)[0, 1])
    assert analysis.correlation_per_token == pytest.approx(
        np.corrcoef(per_token, measured)[0, 1]
    )


def test_several_passes_and_generators_give_the_same(model):
    options = dict(modalities=MODALITIES, progress=False)
    once = analyze(model, _data(), **options)
    passes = analyze(model, (s for s in _data()), max_statistics_bytes=1, **options)
    assert passes == once
    assert Analysis.from_json(once.to_json()) == once


def test_linears_that_share_an_input_are_one_entry():
    model = tiny_models.omni_thinker(layers=1)
    samples = tiny_models.samples(audio=True)
    found = analyze(model, samples, progress=False)
    assert [len(i.linears) for i in found.inputs.values()] == [3, 1, 2, 1]
    assert len(found.effective_ranks) == 7
    assert set(found.sqnr_by_rank["masquant"]) == {"vision", "audio"}
    for module in model.modules():
        assert type(module).__name__ != "MASQuantObservedLinear"
    assert "forward" not in model.__dict__
    assert str(found) and len(found.figures()) == 6


def test_one_modality_has_nothing_to_compare():
    found = analyze(
        tiny_models.PlainModel(), [{"x": torch.randn(2, 5, 16)}], progress=False
    )
    assert found.modalities == ("text",)
    assert found.inputs["first"].ranges["text"].dominance == 1
    assert found.inputs["first"].losses["text"].measured == 0
    assert found.effective_ranks == {"first": {}, "second": {}}
    assert math.isnan(found.correlation)


def test_a_modality_of_one_token_has_no_variation(model):
    sample = _data(1)[0]
    sample["modality_ids"] = torch.zeros_like(sample["modality_ids"])
    sample["modality_ids"][0, 0] = 1
    found = analyze(model, [sample], modalities=("text", "vision"), progress=False)
    assert found.inputs["first"].ranges["vision"].tokens == 1
    assert math.isfinite(found.inputs["first"].losses["vision"].measured)
    # One token spans one direction.
    assert found.effective_ranks["first"]["vision"].whitened == pytest.approx(1)
    assert found.sqnr_by_rank["masquant-paper"]["vision"][0] == -math.inf
    assert math.isnan(found.sqnr_by_rank["masquant"]["vision"][0])
    assert str(found) and found.figures()


def test_sixteen_bit_activations_lose_nothing():
    # Groups of 128 inputs.
    model = torch.nn.Sequential(torch.nn.Linear(128, 8))
    found = analyze(
        model, [{"input": torch.randn(2, 9, 128)}], scheme="w4a16", progress=False
    )
    assert found.inputs["0"].losses == {}
    assert list(found.figures()) == ["ranges", "dominance"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(samples=[]), ValueError, "samples is empty"),
        (dict(scheme="w2a2"), ValueError, "unknown scheme 'w2a2'"),
        (dict(alpha=1.5), ValueError, "alpha must lie in 0..1"),
        (dict(alpha="a"), TypeError, "alpha must be a number"),
        (dict(ranks=()), ValueError, "ranks is a sequence of shares"),
        (dict(ranks=0.5), ValueError, "ranks is a sequence of shares"),
        (dict(ranks=(0.1, 32)), ValueError, "shares of .* got 32"),
        (dict(ranks=(0.1, math.nan)), ValueError, "shares of .* got nan"),
        (dict(include="third"), ValueError, "matches no linear"),
        (dict(modalities="text"), TypeError, "sequence of names"),
        (dict(modalities=(*MODALITIES, "smell")), ValueError, "no smell token"),
    ],
)
def test_what_cannot_be_analyzed_is_told_in_a_sentence(model, options, error, message):
    options = {"samples": _data(), "modalities": MODALITIES, **options}
    with pytest.raises(error, match=message):
        analyze(model, progress=False, **options)
    assert type(model.first) is torch.nn.Linear


def test_nan_is_told_with_its_place(model):
    data = _data()
    data[1]["x"][0, 0, 3] = math.nan
    with pytest.raises(ValueError, match="first: its input holds nan or inf"):
        analyze(model, data, modalities=MODALITIES, progress=False)
    broken = tiny_models.PlainModel()
    broken.second.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="second: its weight holds no values, nan"):
        analyze(broken, _data(), modalities=MODALITIES, progress=False)
    with pytest.raises(ValueError, match="first: its weight holds no values"):
        analyze(tiny_models.PlainModel().to("meta"), _data(), progress=False)


def test_a_quantized_model_is_refused():
    model = tiny_models.quantized(tiny_models.PlainModel())
    with pytest.raises(ValueError, match="quantized or observed already"):
        analyze(model, _data(), modalities=MODALITIES, progress=False)


@pytest.mark.parametrize(
    "values, expected",
    [([3.0], 1), ([2.0] * 7, 7), ([0.0, 0.0], 0), ([], 0), ([1.0, 0.0], 1)],
)
def test_the_effective_rank_of_simple_spectra(values, expected):
    assert effective_rank(torch.tensor(values)) == pytest.approx(expected)


def test_activations_of_zeros_and_exact_ones():
    factor = torch.ones(4)
    assert math.isnan(activation_sqnr(torch.zeros(3, 4), factor, 8))
    # Multiples of the step, a power of two, come back as they were.
    exact = torch.tensor([[127.0, 1.0, -5.0, 0.0]])
    assert activation_sqnr(exact, factor, 8) == math.inf


def test_kept_tokens_are_few_and_evenly_drawn(model):
    from torchao_masquant.routing import Router

    linears = {"first": model.first}
    session = TokenSession(linears, Router(("text", "vision")), tokens=64)
    session.attach_linear("first", model.first)
    try:
        for call in range(50):
            ids = torch.arange(40)[None] % 2
            x = torch.full((1, 40, 16), float(call)) + ids[..., None] * 1000
            with session.router.explicit(ids):
                session.observe(model.first, x)
    finally:
        session.detach_linear(model.first)
    for index in range(2):
        kept = session.tokens("first", index)
        assert kept.shape == (64, 16)
        calls = kept[:, 0] - 1000 * index
        assert ((calls >= 0) & (calls < 50)).all()
        # The mean of 64 of 0..49: 24.5, with a deviation of 14.4 / 8.
        assert abs(calls.mean().item() - 24.5) < 5 * 14.4 / 8


def test_the_trained_model():
    """What was planted into it is found, and theorem 1 foretells what it costs."""
    found = analyze(
        digits.load_model("outliers"),
        digits.calibration_samples(32),
        ranks=(0.05,),
        progress=False,
    )
    # One factor for all is made of relative ranges, so that little is left to gain.
    assert found.verdict.startswith("One factor serves all modalities")
    for spread in found.spreads.values():
        assert spread.largest_gain < MUCH
        # What was planted into the residual stream, and what text has there.
        shares = {m: s.constant_share for m, s in spread.modalities.items()}
        assert shares["vision"] > 0.75 > shares["text"]
    # Measured with all 128 samples: 0.971 and 0.992; whitened ranks 3.4 of 219.
    assert found.correlation > 0.9 and found.correlation_per_token > 0.9
    for ranks in found.effective_ranks.values():
        for rank in ranks.values():
            assert rank.whitened < rank.plain / 3 < rank.full
    for modality in ("vision", "audio"):
        published, gauged = (
            found.sqnr_by_rank[m][modality][0] for m in ("masquant-paper", "masquant")
        )
        assert gauged > published
