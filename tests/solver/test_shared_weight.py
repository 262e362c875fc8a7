# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The integers that modalities share: rounded for all of them, and clipped."""

import dataclasses

import gptq_oracle
import numpy as np
import pytest
import torch

from torchao_masquant.schemes import get_scheme
from torchao_masquant.solver.shared_weight import round_jointly, round_to_nearest

N, K = 10, 24
DAMPING = 0.01

SCHEMES = {
    "w8a8": get_scheme("w8a8"),
    "w4a8": get_scheme("w4a8"),
    "w3a3": get_scheme("w3a3"),
    "w4a8 in groups": dataclasses.replace(get_scheme("w4a8"), group_size=6),
    "w4a16": dataclasses.replace(get_scheme("w4a16"), group_size=8),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def _problem(modalities=3, seed=0, rank=2):
    """Weight, factors, pairs and covariances of modalities that differ in all."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(N, K))
    factors, pairs, covariances = [], [], []
    for index in range(modalities):
        factors.append(np.exp(rng.normal(size=K) / 2))
        pair = rng.normal(size=(K, rank)) / 5, rng.normal(size=(rank, N)) / 5
        pairs.append(pair if index else None)
        x = rng.normal(size=(40, K)) @ rng.normal(size=(K, K)) * 10.0**index
        covariances.append(np.cov(x.T, bias=True))
    # A weight of float32, as models hold it.
    return weight.astype(np.float32).astype(float), factors, pairs, covariances


def _start(weight, factors, scheme, importance=None):
    # Of factors as the recipe holds them; float64 behind them changes the target.
    return round_to_nearest(
        torch.from_numpy(weight).float(),
        torch.from_numpy(factors[0]),
        SCHEMES[scheme],
        importance,
    )


def _jointly(weight, factors, pairs, covariances, importances, start, scheme):
    return round_jointly(
        torch.from_numpy(weight),
        [torch.from_numpy(f) for f in factors],
        [p and tuple(map(torch.from_numpy, p)) for p in pairs],
        [torch.from_numpy(c) for c in covariances],
        importances,
        start,
        SCHEMES[scheme],
    )


def _grid(start, scheme):
    scale = start.scale.double().numpy()
    zero = np.zeros_like(scale)
    if start.zero_point is not None:
        zero = start.zero_point.double().numpy()
    bits = SCHEMES[scheme].weight_bits
    return scale, zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _values(integers, start, scheme):
    scale, zero, *_ = _grid(start, scheme)
    width = K // scale.shape[1]
    return (integers - np.repeat(zero, width, 1)) * np.repeat(scale, width, 1)


def _wanted(weight, factor, pair):
    return weight * factor - (0 if pair is None else (pair[0] @ pair[1]).T)


def _objective(values, weight, factors, pairs, covariances, importances):
    """Each modality's relative error, weighted, as the docstring states it."""
    total = 0.0
    for factor, pair, covariance, importance in zip(
        factors, pairs, covariances, importances
    ):
        energy = np.trace(weight @ covariance @ weight.T)
        if energy > 0:
            error = (_wanted(weight, factor, pair) - values) / factor
            total += importance * np.trace(error @ covariance @ error.T) / energy
    return total


@every_scheme
@pytest.mark.parametrize("importances", [(1, 0.3, 0.3), (0, 1, 2), (1, 1, 1)])
def test_lowers_what_it_says_it_lowers(scheme, importances):
    ratios = []
    for seed in range(6):
        problem = _problem(seed=seed)
        start = _start(*problem[:2], scheme)
        found = _jointly(*problem, importances, start, scheme)
        assert torch.equal(found.scale, start.scale)
        assert (found.zero_point is None) == SCHEMES[scheme].symmetric
        low, high = _grid(start, scheme)[2:]
        assert low <= found.qdata.min() and found.qdata.max() <= high
        assert found.qdata.dtype == torch.int8
        before, after = (
            _objective(_values(s.qdata.numpy(), start, scheme), *problem, importances)
            for s in (start, found)
        )
        np.testing.assert_allclose(
            found.dequantize().numpy(),
            _values(found.qdata.numpy(), start, scheme),
            rtol=1e-6,
        )
        ratios.append(after / before)
    assert max(ratios) < 1 and np.mean(ratios) < 0.9


@every_scheme
def test_is_gptq_of_the_least_squares_target(scheme):
    """Hessian and target by stacking all modalities into one least-squares problem."""
    weight, factors, pairs, covariances = _problem(seed=8)
    importances = (1.0, 0.3, 0.7)
    roots, wanted = [], []
    for factor, pair, covariance, importance in zip(
        factors, pairs, covariances, importances
    ):
        # sqrt(v / E) C^1/2 of the smoothed tokens, as rows of "tokens".
        energy = np.trace(weight @ covariance @ weight.T)
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(values.clip(0))).T / factor
        roots.append(root * np.sqrt(importance / energy))
        wanted.append(roots[-1] @ _wanted(weight, factor, pair).T)
    tokens, outputs = np.concatenate(roots), np.concatenate(wanted)
    hessian = tokens.T @ tokens
    ridge = np.sqrt(DAMPING * np.trace(hessian) / K)
    # The damping as K more tokens, which want W * s_base.
    target = np.linalg.lstsq(
        np.concatenate([tokens, ridge * np.eye(K)]),
        np.concatenate([outputs, ridge * (weight * factors[0]).T]),
        rcond=None,
    )[0].T
    start = _start(weight, factors, scheme)
    expected = gptq_oracle.gptq(target, hessian, *_grid(start, scheme), DAMPING)
    found = _jointly(weight, factors, pairs, covariances, importances, start, scheme)
    np.testing.assert_array_equal(found.qdata.numpy(), expected)


@every_scheme
def test_one_modality_is_gptq_of_its_own_weight(scheme):
    weight, factors, pairs, covariances = _problem(1, seed=3)
    start = _start(weight, factors, scheme)
    found = _jointly(weight, factors, pairs, covariances, [1.0], start, scheme)
    expected = gptq_oracle.gptq(
        weight * factors[0],
        covariances[0] / np.outer(factors[0], factors[0]),
        *_grid(start, scheme),
        DAMPING,
    )
    np.testing.assert_array_equal(found.qdata.numpy(), expected)


@pytest.mark.parametrize("reason", ["constant", "weight of zero"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_modality_that_does_not_count(reason, index):
    """As if it were not there, whatever its pair and its factor are."""
    weight, factors, pairs, covariances = _problem(seed=4)
    start = _start(weight, factors, "w4a8")
    importances = [1.0, 0.3, 0.5]
    if reason == "constant":
        covariances[index] = np.zeros((K, K))
    else:
        importances[index] = 0.0
    found = _jointly(weight, factors, pairs, covariances, importances, start, "w4a8")
    others = [i for i in range(3) if i != index]
    # Index 0 gives the start and where the damping draws to: its factor stays.
    hessian = np.zeros((K, K))
    aim = np.zeros((N, K))
    for i in others:
        energy = np.trace(weight @ covariances[i] @ weight.T)
        smoothed = covariances[i] / np.outer(factors[i], factors[i]) / energy
        hessian += importances[i] * smoothed
        aim += importances[i] * _wanted(weight, factors[i], pairs[i]) @ smoothed
    ridge = DAMPING * np.trace(hessian) / K
    target = np.linalg.solve(
        hessian + ridge * np.eye(K), (aim + ridge * weight * factors[0]).T
    ).T
    expected = gptq_oracle.gptq(target, hessian, *_grid(start, "w4a8"), DAMPING)
    np.testing.assert_array_equal(found.qdata.numpy(), expected)


def test_where_nothing_varies_the_start_stays():
    weight, factors, pairs, covariances = _problem(seed=5)
    start = _start(weight, factors, "w4a8")
    still = [np.zeros((K, K))] * 3
    assert _jointly(weight, factors, pairs, still, [1, 1, 1], start, "w4a8") is start
    none = _jointly(weight, factors, pairs, covariances, [0, 0, 0], start, "w4a8")
    assert none is start
    dead = np.zeros_like(weight)
    assert _jointly(dead, factors, pairs, covariances, [1] * 3, start, "w4a8") is start


def test_a_modality_that_weighs_more_is_served_better():
    """Between the two extremes, and never the other way round."""
    problem = _problem(2, seed=6)
    start = _start(*problem[:2], "w4a8")

    def error(values, index):
        only = [0.0, 0.0]
        only[index] = 1.0
        return _objective(values, *problem, only)

    found = {}
    for importance in (1e-3, 1.0, 1e3):
        shared = _jointly(*problem, [1.0, importance], start, "w4a8")
        values = _values(shared.qdata.numpy(), start, "w4a8")
        found[importance] = [error(values, index) for index in (0, 1)]
    assert found[1e3][1] < found[1.0][1] < found[1e-3][1]
    assert found[1e-3][0] < found[1.0][0] < found[1e3][0]


def test_directions_that_no_modality_uses_keep_the_weight():
    """Both see the first half of the channels alone: the rest is rounded as it is."""
    weight, factors, pairs, covariances = _problem(2, seed=7)
    # The largest of a row lies on the boundary between two integers: not in there.
    weight[:, 0] = 5 / factors[0].min()
    factors[0][0] = factors[0].max()
    for covariance in covariances:
        covariance[K // 2 :] = covariance[:, K // 2 :] = 0
    start = _start(weight, factors, "w8a8")
    found = _jointly(weight, factors, pairs, covariances, [1, 1], start, "w8a8")
    half = slice(K // 2, None)
    assert torch.equal(found.qdata[:, half], start.qdata[:, half])
    assert not torch.equal(found.qdata, start.qdata)


# Clipping.

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def _losses(weight, factor, scheme, importance, clip):
    """(N, G) weighted error for one share of the range, in float64."""
    bits = SCHEMES[scheme]
    groups = K // (bits.group_size or K)
    blocks = (weight * factor).reshape(N, groups, -1)
    low, high = -(2 ** (bits.weight_bits - 1)), 2 ** (bits.weight_bits - 1) - 1
    least, most = clip * blocks.min(-1), clip * blocks.max(-1)
    zero = 0
    if bits.symmetric:
        scale = 2 * np.maximum(-least, most)[..., None] / (high - low)
    else:
        least, most = least.clip(max=0), most.clip(min=0)
        scale = (most - least)[..., None] / (high - low)
        zero = low - np.round(least[..., None] / scale)
    levels = np.clip(np.round(blocks / scale) + zero, low, high)
    error = (levels - zero) * scale - blocks
    return (error**2 * importance.reshape(groups, -1)).sum(-1)


@every_scheme
@pytest.mark.parametrize("kind", ["even", "uneven", "one channel"])
def test_clipping_finds_the_best_share_of_each_range(scheme, kind):
    weight, factors, _, _ = _problem(seed=9)
    weight[:, 3] *= 4  # something to clip
    importance = np.ones(K)
    if kind == "uneven":
        importance = np.random.default_rng(1).exponential(size=K) ** 2
        importance[3] = 1e-4
    elif kind == "one channel":
        importance = (np.arange(K) == 3).astype(float)
    shared = _start(weight, factors, scheme, torch.from_numpy(importance))
    values = _values(shared.qdata.numpy(), shared, scheme)
    groups = shared.scale.shape[1]
    error = (values - weight * factors[0]).reshape(N, groups, -1)
    found = (error**2 * importance.reshape(groups, -1)).sum(-1)
    losses = np.stack(
        [_losses(weight, factors[0], scheme, importance, c) for c in CLIPS]
    )
    # Float32 puts a weight of up to 128 steps 2^-17 steps off, so that its error of up
    # to half a step squared comes out with 2^-15 of a step squared at most.
    step = shared.scale.double().numpy()
    slack = importance.reshape(groups, -1).sum(-1) * step**2 * 2**-14
    assert (found <= losses[0] + slack).all()
    assert (found <= losses.min(0) + slack).all()
    if kind == "uneven" and SCHEMES[scheme].weight_bits <= 4:
        assert (found < 0.9 * losses[0]).any()


@every_scheme
def test_without_importance_the_whole_range(scheme):
    """A channel that matters alone, at the end of the range, is not clipped either."""
    weight, factors, _, _ = _problem(seed=10)
    weight[:, ::8] = 5 * np.abs(weight).max() / factors[0][::8]
    whole = _start(weight, factors, scheme)
    only = torch.zeros(K, dtype=torch.float64)
    assert torch.equal(_start(weight, factors, scheme, only).qdata, whole.qdata)
    losses = _losses(weight, factors[0], scheme, np.ones(K), 1.0)
    values = _values(whole.qdata.numpy(), whole, scheme)
    error = (values - weight * factors[0]).reshape(*losses.shape, -1)
    np.testing.assert_allclose((error**2).sum(-1), losses, rtol=1e-3)
