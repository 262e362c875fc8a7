# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``alpha``, ``separation`` and ``modality_weights``: what is chosen, and for whom."""

import dataclasses

import group_oracle
import numpy as np
import pytest
import torch
from group_oracle import data, statistics
from hadamard_oracle import hadamard_f64

from torchao_masquant.options import ALPHAS, SEPARATIONS, SolverOptions
from torchao_masquant.solver.judge import mean_log_error, token_errors
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.modality_input import modality_inputs
from torchao_masquant.solver.shared_weight import round_to_nearest

AUTO = {"alpha": "auto", "separation": "auto"}


def _solve(tokens, weights, options):
    return solve_group(weights, statistics(tokens), options)


def _judge(layers, weights, tokens, options, importances=(1, 1, 1)):
    """Weighted mean of the logarithms, from float64 outputs of this folder's own."""
    errors = group_oracle.log_errors(layers, weights, tokens, options.number_format)
    used = importances[: len(tokens)]
    total = sum(used[index] * error for (_, index), error in errors.items())
    return total / (len(weights) * sum(used))


def _same(first, second):
    return all(
        layer.tensors().keys() == second[name].tensors().keys()
        and all(torch.equal(t, second[name].tensors()[k]) for k, t in parts.items())
        for name, layer in first.items()
        for parts in [layer.tensors()]
    )


@pytest.mark.parametrize(
    ("scheme", "modalities", "seed"),
    [("w8a8", 3, 0), ("w4a8", 3, 1), ("w4a4", 2, 2), ("w3a3", 1, 1)],
)
def test_auto_takes_the_best_of_what_it_tries(scheme, modalities, seed):
    """First the exponents at the modality's own range, then the separations."""
    tokens, weights = data(modalities, seed)
    auto = SolverOptions(scheme, rank=2, **AUTO)
    assert (auto.alphas, auto.separations) == (ALPHAS, SEPARATIONS)
    found = _solve(tokens, weights, auto)
    tried = {}

    def attempt(alpha, separation):
        options = dataclasses.replace(auto, alpha=alpha, separation=separation)
        layers = _solve(tokens, weights, options)
        tried[alpha, separation] = (_judge(layers, weights, tokens, auto), layers)

    for alpha in (0.3, 0.5, 0.7):
        attempt(alpha, 1.0)
    best_alpha = min(tried, key=lambda key: tried[key][0])[0]
    for separation in (0.5, 0.0):
        attempt(best_alpha, separation)
    chosen = min(tried, key=lambda key: tried[key][0])
    # All candidates differ by more than the float32 of the operator, or not at all.
    assert _same(found, tried[chosen][1])
    # What a solution without a choice takes would not have been the best.
    assert chosen != (0.5, 1.0)
    # An exponent alone, for a separation that a caller names.
    own = dataclasses.replace(auto, separation=1.0)
    assert _same(_solve(tokens, weights, own), tried[best_alpha, 1.0][1])


@pytest.mark.parametrize(
    "scheme, low_rank_bits", [("w8a8", 8), ("w4a6", 16), ("w4a16", 8)]
)
def test_the_judge_against_float64(scheme, low_rank_bits):
    tokens, weights = data()
    options = SolverOptions(
        scheme,
        alpha=0.5,
        separation=1.0,
        rank=2,
        group_size=8 if scheme == "w4a16" else None,
        low_rank_bits=low_rank_bits,
        modality_weights={"audio": 2.0, "text": 0.5},
    )
    layers = _solve(tokens, weights, options)
    ours = mean_log_error(weights, layers, statistics(tokens), options)
    expected = _judge(layers, weights, tokens, options, (0.5, 1.0, 2.0))
    # Ties that float32 rounds the other way. The solution has already rounded its pair
    # to 8 bits; doing so once more, as the tensor does, changes nothing.
    assert ours == pytest.approx(expected, abs=2e-3)


def test_the_judge_hears_no_constant():
    """Errors are relative to what varies; a modality that does not vary has no say."""
    tokens, weights = data(3)
    options = SolverOptions("w4a4", alpha=0.5, separation=1.0, rank=1)
    still = [*tokens[:2], tokens[2][:1].expand_as(tokens[2]).contiguous()]
    layers = _solve(still, weights, options)
    ours = mean_log_error(weights, layers, statistics(still), options)
    expected = _judge(layers, weights, still[:2], options)
    assert ours == pytest.approx(expected, abs=2e-3)
    # One token, and none that weighs anything.
    single = [tokens[0], tokens[1][:1]]
    layers = _solve(single, weights, options)
    ours = mean_log_error(weights, layers, statistics(single), options)
    assert ours == pytest.approx(_judge(layers, weights, single[:1], options), abs=2e-3)
    deaf = dataclasses.replace(options, modality_weights={"text": 0, "vision": 0})
    assert mean_log_error(weights, layers, statistics(single), deaf) == 0


def _sizes(tokens, weights, hadamard_size):
    """What factors are made of: of each modality's channels, of all, of the weights'.

    The largest value without a rotation, the root mean square with one; of what is left
    of tokens without their center, and of bfloat16's grain at least.
    """
    rows = np.concatenate([w.double().numpy() for w in weights.values()])
    if hadamard_size == 1:

        def size(x, axis=0):
            return np.abs(x).max(axis)

        def both(sizes):
            return np.max(sizes, 0)

    else:

        def size(x, axis=0):
            return np.sqrt((x**2).mean(axis))

        def both(sizes):
            # Each relative to what the weights make of it, at their mean loudness.
            made = [(s**2 * size(rows) ** 2).sum() for s in sizes]
            parts = [s**2 / e for s, e in zip(sizes, made)]
            return np.sqrt(np.mean(parts, 0) * np.mean(made))

    own = []
    for x in tokens:
        exact = x.double().numpy()
        assert group_oracle.ordinary(exact).all()
        own.append(np.maximum(size(exact - group_oracle.center(x)), size(exact) / 256))
    return own, both(own), size(rows)


@pytest.mark.parametrize("hadamard_size", [1, None])
def test_separation_goes_from_the_own_range_to_that_of_all(hadamard_size):
    """Geometrically, and means are off before ranges are taken."""
    tokens, weights = data(3)
    own, unified, of_weights = _sizes(tokens, weights, hadamard_size)
    for separation in (1.0, 0.5, 0.25, 0.0):
        options = SolverOptions(
            "w8a8", alpha=0.6, separation=separation, hadamard_size=hadamard_size
        )
        layer = _solve(tokens, weights, options)["q"]
        assert layer.hadamard_size == (None if hadamard_size == 1 else 8)
        for index, range_ in enumerate(own):
            used = range_**separation * unified ** (1 - separation)
            expected = used**0.6 / of_weights**0.4
            ratio = layer.smoothing_factor[index].double().numpy() / expected
            # But for the gauge, one constant, which one factor for all does not have.
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
            if index == 0 or separation == 0:
                assert ratio[0] == pytest.approx(1, rel=1e-6)


def test_a_weight_only_scheme_has_one_range():
    tokens, weights = data(3)
    layers = [
        _solve(
            tokens,
            weights,
            SolverOptions("w4a16", alpha=0.5, separation=s, group_size=8),
        )
        for s in (0.0, 1.0)
    ]
    assert _same(*layers)


# What modalities weigh.


@pytest.mark.parametrize("scheme, options", [("w4a8", {}), ("w3a3", {"clip": False})])
def test_a_modality_that_weighs_more_does_not_lose(scheme, options):
    """Against what it loses where it weighs next to nothing."""
    tokens, weights = data(3, seed=1)
    for index, name in enumerate(group_oracle.NAMES):
        errors = []
        for importance in (1e-3, 0.3, 1e3):
            chosen = SolverOptions(
                scheme,
                alpha=0.5,
                separation=1.0,
                rank=1,
                modality_weights={name: importance},
                **options,
            )
            layers = _solve(tokens, weights, chosen)
            found = group_oracle.log_errors(
                layers, weights, tokens, chosen.number_format
            )
            errors.append(np.mean([e for (_, i), e in found.items() if i == index]))
        # Rounding is greedy: 2 % of the error.
        assert errors[2] < errors[0] and errors[1] < errors[0] + 0.02


def test_no_modality_weighs_anything():
    """Nothing to choose by: the first candidates, the whole range, the nearest."""
    tokens, weights = data(2)
    none = {"text": 0.0, "vision": 0.0}
    found = _solve(
        tokens, weights, SolverOptions(modality_weights=none, rank=0, **AUTO)
    )
    plain = SolverOptions(
        alpha=ALPHAS[0], separation=1.0, rank=0, rounding="nearest", clip=True
    )
    even = dataclasses.replace(plain, modality_weights=none)
    assert _same(found, _solve(tokens, weights, even))


@pytest.mark.parametrize(
    "importances, hadamard_size", [((1.0, 0.3, 0.3), None), ((0.0, 1.0, 4.0), 1)]
)
def test_clipping_goes_by_what_each_modality_loses(importances, hadamard_size):
    """An error of a channel costs a modality its variance there, smoothed and rotated."""
    tokens, weights = data(3, seed=4)
    options = SolverOptions(
        "w3a3",
        alpha=0.5,
        separation=1.0,
        rank=0,
        rounding="nearest",
        modality_weights=dict(zip(group_oracle.NAMES, importances)),
        hadamard_size=hadamard_size,
    )
    layers = _solve(tokens, weights, options)
    size = 8 if hadamard_size is None else None
    rotation = hadamard_f64(group_oracle.K, size)
    shares = [i.share for i in modality_inputs(statistics(tokens), options)]
    own, _, of_weights = _sizes(tokens, weights, hadamard_size)
    exact = {name: w.double().numpy() for name, w in weights.items()}
    lost, base, shared = [], None, None
    for index, x in enumerate(tokens):
        centered = x.double().numpy() - group_oracle.center(x)
        factor = np.sqrt(own[index] / of_weights)
        if index == 0:
            base = torch.from_numpy(factor)
            shared = {
                name: round_to_nearest(
                    w, base, options.number_format, hadamard_size=size
                )
                .dequantize()
                .numpy()
                for name, w in weights.items()
            }
        else:
            # The gauge, before anything is clipped: one number for both linears.
            parts = [
                (centered @ w.T, (centered / factor) @ rotation @ shared[name].T)
                for name, w in exact.items()
            ]
            sizes = [np.linalg.norm(y) for y, _ in parts]
            wanted = np.concatenate([y.ravel() / n for (y, _), n in zip(parts, sizes)])
            met = np.concatenate([v.ravel() / n for (_, v), n in zip(parts, sizes)])
            factor = factor / (met @ wanted / (met @ met))
        lost.append(((centered / factor @ rotation) ** 2).mean(0))
    # No modality counts as more than ten times as loud as the quietest.
    quietest = min(own.sum() for own in lost)
    importance = sum(
        share * own * min(1, 10 * quietest / own.sum())
        for share, own in zip(shares, lost)
    )
    for name, weight in weights.items():
        expected = round_to_nearest(
            weight, base, options.number_format, torch.from_numpy(importance), size
        )
        assert torch.equal(layers[name].scale, expected.scale)
        assert torch.equal(layers[name].qdata, expected.qdata)


def test_a_loud_token_hides_no_error():
    """Errors are also told beside a typical token, of what all have, not of a sink."""
    tokens, weights = data(1)
    options = SolverOptions("w4a4", alpha=0.5, rank=0)
    name, weight = next(iter(weights.items()))
    layers = _solve(tokens, weights, options)
    quantized = layers[name].quantize(weight, options.number_format, ("text",))

    def measured(rows):
        return token_errors(weight, quantized, statistics([rows]), 0)

    quiet = measured(tokens[0])
    ids = torch.zeros(len(tokens[0]), dtype=torch.int64)
    y = torch.ops.masquant.linear(tokens[0], quantized, ids, None).double()
    exact = tokens[0].double() @ weight.double().t()
    lengths, energies = (y - exact).norm(dim=1), exact.square().sum(1)
    expected = lengths.mean() ** 2 / energies.median()
    assert quiet.relative == pytest.approx(expected.item(), rel=1e-6)
    loud = measured(torch.cat((tokens[0], 1000 * tokens[0][:1])))
    assert loud.relative > quiet.relative
    assert loud.error / loud.varying < quiet.error / quiet.varying
    # Where most outputs are zero, the few that are not are what there is.
    silent = torch.cat((tokens[0][:3], torch.zeros_like(tokens[0])))
    assert measured(silent).relative > 0
    assert measured(torch.zeros_like(tokens[0])) is None
    # One token is enough for a damage, if not for what varies.
    lone = measured(tokens[0][:1])
    expected = lengths[0] ** 2 / energies[0]
    assert lone.relative == pytest.approx(expected.item(), rel=1e-6)
