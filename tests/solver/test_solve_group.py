# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Closed-form MASQuant, published and ours, against float64 formulas."""

import numpy as np
import pytest
import torch
from solver_oracle import check_rounded, smooth, truncated

from torchao_masquant import SCHEMES
from torchao_masquant.options import METHODS, SolverOptions
from torchao_masquant.solver import smoothing
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.smoothing import smoothing_factor
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import quantize_smoothed_weight

#: Without what the closed form of the paper has not, but the gauge and the bias.
PLAIN = dict(
    shift=False,
    rounding="nearest",
    clip=False,
    alpha=0.5,
    separation=1.0,
    hadamard_size=1,
)

K, WIDTHS, TOKENS = 24, {"q": 20, "k": 12, "v": 12}, 200


def _data(modalities, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for index in range(modalities):
        x = torch.randn(TOKENS, K, generator=generator)
        if index:
            x = x * (0.2 * index) * torch.rand(K, generator=generator)
            x[:, index] += 15 * index
        tokens.append(x)
    weights = {
        name: torch.randn(n, K, generator=generator) * 0.1 for name, n in WIDTHS.items()
    }
    return tokens, weights


def _statistics(tokens):
    names = ("text", "vision", "audio")[: len(tokens)]
    statistics = InputStatistics(K, names, torch.device("cpu"), second_moments=True)
    for start in range(0, TOKENS, 64):
        chunk = [x[start : start + 64] for x in tokens]
        ids = torch.cat([torch.full((len(c),), i) for i, c in enumerate(chunk)])
        statistics.update("q", torch.cat(chunk), ids)
    return statistics


def _solve(tokens, weights, **options):
    return solve_group(weights, _statistics(tokens), SolverOptions(**options))


def _shared(weight, base, bits):
    """Q(W * s_base) of a float32 weight, checked, in float64."""
    integers, scale, _ = quantize_smoothed_weight(
        weight, torch.from_numpy(base).float().reciprocal(), bits
    )
    smoothed = weight.double().numpy() * base
    return check_rounded(
        integers.double().numpy(), scale.double().numpy(), smoothed, bits
    )


def _factors(tokens, weights, alpha=0.5):
    weight_absmax = np.max(
        [w.abs().amax(0).double().numpy() for w in weights.values()], 0
    )
    return [
        smooth(x.abs().amax(0).double().numpy(), weight_absmax, alpha) for x in tokens
    ]


def _gauge(x, weights, shared, s):
    """One g for all linears, by stacking them into one least-squares problem."""
    centered = x - x.mean(0)
    columns, targets = [], []
    for name, weight in weights.items():
        y = centered @ weight.T
        norm = np.linalg.norm(y)
        columns.append(((centered / s) @ shared[name].T / norm).ravel())
        targets.append((y / norm).ravel())
    return np.linalg.lstsq(
        np.concatenate(columns)[:, None], np.concatenate(targets), rcond=None
    )[0][0]


@pytest.mark.parametrize(
    "method, modalities, scheme",
    [
        ("masquant", 3, "w4a8"),
        ("masquant", 2, "w8a8"),
        ("masquant-paper", 3, "w8a8"),
        ("masquant-paper", 2, "w4a8"),
    ],
)
def test_equals_the_formulas(method, modalities, scheme):
    tokens, weights = _data(modalities)
    rank = 5
    plain = PLAIN if method == "masquant" else {}
    layers = _solve(tokens, weights, scheme=scheme, method=method, rank=rank, **plain)

    exact = {name: w.double().numpy() for name, w in weights.items()}
    s = _factors(tokens, weights)
    bits = int(scheme[1])
    shared = {name: _shared(w, s[0], bits) for name, w in weights.items()}
    for index in range(1, modalities):
        x = tokens[index].double().numpy()
        if method == "masquant":
            s[index] = s[index] / _gauge(x, exact, shared, s[index])
        smoothed = x / s[index]
        if method == "masquant":
            mean = smoothed.mean(0)
            whitened = smoothed - mean
        else:
            whitened = smoothed
        for name, layer in layers.items():
            difference = exact[name] * s[index] - shared[name]
            product = truncated(whitened, difference, rank)
            start = sum(layer.ranks[: index - 1])
            columns = slice(start, start + layer.ranks[index - 1])
            l1, l2 = layer.l1[:, columns].double(), layer.l2[columns].double()
            assert l1.shape[1] == rank
            ours = whitened @ (l1 @ l2).numpy()
            expected = whitened @ product
            # bfloat16 pair: two roundings of 2^-9 of each term, rank terms a sum.
            bound = 2 * 2**-9 * (np.abs(whitened @ l1.numpy()) @ l2.abs().numpy())
            bound += 2**-8 * np.abs(whitened) @ (l1.abs() @ l2.abs()).numpy()
            assert (np.abs(ours - expected) <= bound + 1e-5).all()
            if method == "masquant":
                left = mean @ (difference.T - (l1 @ l2).numpy())
                bias = layer.modality_bias[index].double().numpy()
                # Float32 bias; the rest are float64 sums of ~200 products.
                np.testing.assert_allclose(bias, left, rtol=1e-6, atol=1e-6)
            else:
                assert layer.modality_bias is None
    stacked = np.stack(s)
    for layer in layers.values():
        np.testing.assert_allclose(layer.smoothing_factor, stacked, rtol=1e-6)


def test_bias_takes_the_mean_of_the_error():
    tokens, weights = _data(3)
    layers = _solve(tokens, weights, rank=2, **PLAIN)
    base = layers["q"].smoothing_factor[0].double().numpy()
    for index in (0, 1, 2):
        x = tokens[index].double().numpy()
        s = layers["q"].smoothing_factor[index].double().numpy()
        for name, layer in layers.items():
            w = weights[name].double().numpy()
            columns = slice(2 * (index - 1), 2 * index) if index else slice(0)
            pair = (layer.l1[:, columns].double() @ layer.l2[columns].double()).numpy()
            approximate = (x / s) @ (_shared(weights[name], base, 4).T + pair)
            approximate += layer.modality_bias[index].double().numpy()
            error = (approximate - x @ w.T).mean(0)
            # 1e-6 of the outputs: float32 factors and float32 bias.
            assert np.abs(error).max() < 1e-6 * np.abs(x @ w.T).max()


def test_baselines_share_one_factor():
    tokens, weights = _data(3)
    layers = _solve(tokens, weights, method="smoothquant")
    absmax = np.max([x.abs().amax(0).double().numpy() for x in tokens], 0)
    weight_absmax = np.max(
        [w.abs().amax(0).double().numpy() for w in weights.values()], 0
    )
    for layer in layers.values():
        np.testing.assert_allclose(
            layer.smoothing_factor[0], smooth(absmax, weight_absmax, 0.5), rtol=1e-6
        )
        assert layer.l1 is None and layer.modality_bias is None and layer.ranks == ()
    for layer in _solve(tokens, weights, method="rtn").values():
        assert torch.equal(layer.smoothing_factor, torch.ones(1, K))


def test_ugly_inputs_stay_finite():
    """A dead channel, one of 1e4, one token, a constant modality, rank beyond all."""
    tokens, weights = _data(3)
    tokens = [x.clone() for x in tokens]
    for x in tokens:
        x[:, 5] = 0
    tokens[1][:, 7] = 1e4
    tokens[2][:] = tokens[2][0]
    weights["q"][:, 9] = 0
    weights["k"][3] = 0
    for method in ("masquant", "masquant-paper"):
        for rank in (0, 1, 1000):
            layers = _solve(tokens, weights, method=method, rank=rank, scheme="w4a4")
            for layer in layers.values():
                for tensor in layer.tensors().values():
                    assert torch.isfinite(tensor).all()
                assert sum(layer.ranks) == (
                    0 if layer.l1 is None else layer.l1.shape[1]
                )
    # A modality that never varies has nothing to whiten by: centred, no pair is left.
    assert _solve(tokens, weights, rank=4)["q"].ranks == (4, 0)


def test_a_single_input_channel_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 1\) has too few input channels"):
        quantize_smoothed_weight(torch.randn(4, 1), torch.ones(1), 8)


# Numerical corners.

NARROW, FEW = {"q": 16, "k": 8, "v": 8}, 150


def _problem(dtype=torch.float32, modalities=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("text", "vision", "audio")[:modalities]
    statistics = InputStatistics(K, names, torch.device("cpu"), second_moments=True)
    tokens = []
    for index in range(modalities):
        x = torch.randn(FEW, K, generator=generator)
        if index:
            x = x * (0.3 * index) * torch.rand(K, generator=generator)
            x[:, 3 * index] += 12.0
        tokens.append(x.to(dtype))
        statistics.update("q", tokens[-1], torch.full((FEW,), index))
    weights = {
        name: (0.1 * torch.randn(n, K, generator=generator)).to(dtype)
        for name, n in NARROW.items()
    }
    return tokens, weights, statistics


@pytest.mark.parametrize(
    "scheme, constants",
    [("w8a8", (0.25, 8.0)), ("w4a8", (64.0, 2.0**-10)), ("w3a3", (0.25, 8.0))]
    # A modality whose range is beyond that of the format by far.
    + [("mxfp4", (2.0**-20, 2.0**20))],
)
def test_the_constant_of_a_factor_is_free(monkeypatch, scheme, constants):
    """Whatever s_m is multiplied by before solving, everything comes out the same.

    Where modalities have factors of their own: one for all leaves nothing to fit.
    """
    monkeypatch.setitem(globals(), "K", SCHEMES[scheme].group_size or K)
    tokens, weights, statistics = _problem()
    options = SolverOptions(scheme, "masquant", rank=3, alpha=0.5, separation=1.0)
    plain = solve_group(weights, statistics, options)
    multiples = iter((1.0, *constants))
    monkeypatch.setattr(
        smoothing,
        "smoothing_factor",
        lambda *arguments: smoothing_factor(*arguments) * next(multiples),
    )
    scaled = solve_group(weights, statistics, options)
    assert next(multiples, None) is None
    for name, layer in plain.items():
        other = scaled[name]
        # Powers of two, so that float64 gives the same bits but for the sums inside
        # eigh and svd; one step of float32 where those end up across a boundary.
        torch.testing.assert_close(
            other.smoothing_factor, layer.smoothing_factor, rtol=2**-22, atol=0
        )
        product = layer.l1.double() @ layer.l2.double()
        bound = 4 * 2**-9 * (layer.l1.double().abs() @ layer.l2.double().abs())
        left = (other.l1.double() @ other.l2.double() - product).abs()
        assert (left <= bound).all()
        size = layer.modality_bias.abs().max()
        assert (other.modality_bias - layer.modality_bias).abs().max() < 2**-7 * size


@pytest.mark.parametrize(
    "method, scheme, dtype",
    [("masquant", scheme, torch.bfloat16) for scheme in SCHEMES]
    + [(method, "w4a8", torch.float16) for method in METHODS]
    + [(method, "w8a8", torch.float32) for method in METHODS],
)
def test_every_method_scheme_and_type(monkeypatch, method, scheme, dtype):
    monkeypatch.setitem(globals(), "K", SCHEMES[scheme].group_size or K)
    _, weights, statistics = _problem(dtype)
    layers = solve_group(weights, statistics, SolverOptions(scheme, method, rank=2))
    pair_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for name, layer in layers.items():
        layer.check(name, 3)
        assert layer.shape == tuple(weights[name].shape)
        assert layer.smoothing_factor.dtype == torch.float32
        assert (layer.smoothing_factor > 0).all()
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())
        per_modality = method.startswith("masquant")
        assert layer.smoothing_factor.shape[0] == (3 if per_modality else 1)
        assert layer.ranks == ((2, 2) if per_modality else ())
        if per_modality:
            assert layer.l1.dtype == layer.l2.dtype == pair_dtype
        assert (layer.modality_bias is not None) == (method == "masquant")


@pytest.mark.parametrize("method, bad", [("rtn", torch.nan), ("masquant", torch.inf)])
def test_a_weight_that_is_not_finite_is_named(method, bad):
    _, weights, statistics = _problem()
    weights["k"][3, 4] = bad
    with pytest.raises(ValueError, match="k: its weight holds nan or inf"):
        solve_group(weights, statistics, SolverOptions(method=method))
