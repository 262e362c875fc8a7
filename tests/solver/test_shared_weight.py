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

from torchao_masquant.options import get_scheme
from torchao_masquant.solver.shared_weight import (
    JointHessian,
    round_to_nearest,
)

N, K = 10, 24
RIDGE = 0.01

SCHEMES = {
    "w8a8": get_scheme("w8a8"),
    "w4a8": get_scheme("w4a8"),
    "w3a3": get_scheme("w3a3"),
    "w4a8 in groups": dataclasses.replace(get_scheme("w4a8"), group_size=6),
    "w4a16": dataclasses.replace(get_scheme("w4a16"), group_size=8),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def _problem(modalities=3, seed=0):
    """What each modality wants of the shared weight, covariances and noise."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(N, K)).astype(np.float32).astype(float)
    wanted, covariances = [weight], []
    for index in range(modalities):
        x = rng.normal(size=(40, K)) @ rng.normal(size=(K, K)) * 2.0**index
        covariances.append(np.cov(x.T, bias=True))
        wanted.append(weight + rng.normal(size=(N, K)) / 5)
    return weight, wanted[:modalities], covariances, np.arange(modalities) * 3.0 + 2


def _start(weight, scheme):
    return round_to_nearest(
        torch.from_numpy(weight).float(), torch.ones(K), SCHEMES[scheme]
    )


def _joint(covariances, noises, shares):
    total = sum(v * c for v, c in zip(shares, covariances))
    noise = sum(v * e for v, e in zip(shares, noises))
    return JointHessian(torch.from_numpy(total), torch.tensor(noise)), noise


def _target(hessian, weight, wanted, covariances, shares):
    met = sum(v * w @ c for v, w, c in zip(shares, wanted, covariances))
    return hessian.target_of(torch.from_numpy(weight), torch.from_numpy(met)).numpy()


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


def _objective(values, wanted, covariances, noises, shares):
    """What modalities lose, noise of rounded activations included, as it is stated."""
    total = 0.0
    for w, c, e, v in zip(wanted, covariances, noises, shares):
        left = w - values
        total += v * (np.trace(left @ c @ left.T) + e * (values**2).sum())
    return total


def _least_squares(weight, wanted, covariances, noises, shares):
    """The minimiser, all modalities stacked into one problem of tokens and outputs."""
    tokens, outputs = [], []
    for w, c, e, v in zip(wanted, covariances, noises, shares):
        values, vectors = np.linalg.eigh(c)
        root = np.sqrt(v) * (vectors * np.sqrt(values.clip(0))).T
        # Noise is more tokens, of which nothing is wanted.
        tokens += [root, np.sqrt(v * e) * np.eye(K)]
        outputs += [root @ w.T, np.zeros((K, N))]
    total = sum(v * c for v, c in zip(shares, covariances))
    # The damping is K tokens that want the weight itself.
    ridge = np.sqrt(RIDGE * np.trace(total) / K)
    tokens.append(ridge * np.eye(K))
    outputs.append(ridge * weight.T)
    return np.linalg.lstsq(np.concatenate(tokens), np.concatenate(outputs), rcond=None)[
        0
    ].T


SHARES = [(1, 0.3, 0.3), (0, 1, 2), (0.2, 0.5, 0.3)]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("noisy", [False, True])
def test_the_target_is_that_of_least_squares(noisy, shares):
    weight, wanted, covariances, noises = _problem(seed=8)
    hessian, _ = _joint(covariances, noises * noisy, shares)
    found = _target(hessian, weight, wanted, covariances, shares)
    expected = _least_squares(weight, wanted, covariances, noises * noisy, shares)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.1, 5.0])
def test_the_target_where_all_want_the_same(noise):
    weight, _, covariances, _ = _problem(seed=3)
    noises, shares = np.full(3, noise), (0.2, 0.5, 0.3)
    hessian, _ = _joint(covariances, noises, shares)
    found = hessian.target(torch.from_numpy(weight)).numpy()
    expected = _least_squares(weight, [weight] * 3, covariances, noises, shares)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    # Noise draws the weight towards zero, more of it further.
    size = np.linalg.norm(weight)
    assert (np.linalg.norm(found) < 0.999 * size) == (noise > 0)


def test_noise_that_changes_nothing_is_left_out():
    """8 bits add a ten thousandth of a channel's variance: no solution for so little."""
    weight, _, covariances, _ = _problem(1, seed=3)
    mean = np.trace(covariances[0]) / K
    for part, same in ((1e-4, True), (1e-3, False)):
        hessian, _ = _joint(covariances, [part * mean], [1.0])
        base = torch.from_numpy(weight)
        assert torch.equal(hessian.target(base), base) == same


@pytest.mark.parametrize(("scheme", "shares"), list(zip(SCHEMES, 2 * SHARES)))
def test_lowers_what_it_says_it_lowers(scheme, shares):
    ratios = []
    for seed in range(6):
        weight, wanted, covariances, noises = _problem(seed=seed)
        start = _start(weight, scheme)
        hessian, _ = _joint(covariances, noises, shares)
        target = _target(hessian, weight, wanted, covariances, shares)
        found = hessian.rounded(torch.from_numpy(target), start, SCHEMES[scheme])
        assert torch.equal(found.scale, start.scale)
        assert (found.zero_point is None) == SCHEMES[scheme].symmetric
        before, after = (
            _objective(
                _values(s.qdata.numpy(), start, scheme),
                wanted,
                covariances,
                noises,
                shares,
            )
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
def test_is_gptq_of_the_target(scheme):
    shares = (1.0, 0.3, 0.7)
    weight, wanted, covariances, noises = _problem(seed=8)
    start = _start(weight, scheme)
    hessian, noise = _joint(covariances, noises, shares)
    target = _target(hessian, weight, wanted, covariances, shares)
    found = hessian.rounded(torch.from_numpy(target), start, SCHEMES[scheme])
    total = sum(v * c for v, c in zip(shares, covariances))
    gptq_oracle.assert_gptq(
        found.qdata.numpy().astype(int), target, total, *_grid(start, scheme), noise
    )


def test_importance_is_what_the_channels_behind_cannot_make_up_for():
    """The variance of a channel, given those that are rounded after it."""
    shares = (1.0, 0.3, 0.7)
    _, _, covariances, noises = _problem(seed=2)
    total = sum(v * c for v, c in zip(shares, covariances))
    damped = total + (RIDGE * np.trace(total) / K + (shares * noises).sum()) * np.eye(K)
    order = sorted(range(K), key=lambda j: -total[j, j])
    hessian, _ = _joint(covariances, noises, shares)
    for at, j in enumerate(order):
        behind = order[at + 1 :]
        crossed = damped[j, behind]
        rest = damped[np.ix_(behind, behind)]
        left = damped[j, j] - crossed @ np.linalg.solve(rest, crossed)
        assert hessian.importance[j].item() == pytest.approx(left, rel=1e-9)


def test_directions_that_no_modality_uses_keep_the_weight():
    """Both see the first half of the channels alone: the rest is rounded as it is."""
    weight, wanted, covariances, noises = _problem(2, seed=7)
    # The largest of a row lies on the boundary between two integers: not in there.
    weight[:, 0] = 5
    for covariance in covariances:
        covariance[K // 2 :] = covariance[:, K // 2 :] = 0
    start = _start(weight, "w8a8")
    hessian, _ = _joint(covariances, 0 * noises, (1, 1))
    target = _target(hessian, weight, wanted, covariances, (1, 1))
    found = hessian.rounded(torch.from_numpy(target), start, SCHEMES["w8a8"])
    half = slice(K // 2, None)
    assert torch.equal(found.qdata[:, half], start.qdata[:, half])
    assert not torch.equal(found.qdata, start.qdata)


# Clipping.

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def _weight_and_factor(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(N, K)).astype(np.float32).astype(float)
    return weight, np.exp(rng.normal(size=K) / 2)


def _nearest(weight, factor, scheme, importance=None):
    return round_to_nearest(
        torch.from_numpy(weight).float(),
        torch.from_numpy(factor),
        SCHEMES[scheme],
        importance,
    )


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


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(scheme, "uneven") for scheme in SCHEMES]
    + [("w4a8", "even"), ("w3a3", "one channel"), ("w4a16", "one channel")],
)
def test_clipping_finds_the_best_share_of_each_range(scheme, kind):
    weight, factor = _weight_and_factor(9)
    weight[:, 3] *= 4  # something to clip
    importance = np.ones(K)
    if kind == "uneven":
        importance = np.random.default_rng(1).exponential(size=K) ** 2
        importance[3] = 1e-4
    elif kind == "one channel":
        importance = (np.arange(K) == 3).astype(float)
    shared = _nearest(weight, factor, scheme, torch.from_numpy(importance))
    values = _values(shared.qdata.numpy(), shared, scheme)
    groups = shared.scale.shape[1]
    error = (values - weight * factor).reshape(N, groups, -1)
    found = (error**2 * importance.reshape(groups, -1)).sum(-1)
    losses = np.stack([_losses(weight, factor, scheme, importance, c) for c in CLIPS])
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
    weight, factor = _weight_and_factor(10)
    weight[:, ::8] = 5 * np.abs(weight).max() / factor[::8]
    whole = _nearest(weight, factor, scheme)
    only = torch.zeros(K, dtype=torch.float64)
    assert torch.equal(_nearest(weight, factor, scheme, only).qdata, whole.qdata)
    losses = _losses(weight, factor, scheme, np.ones(K), 1.0)
    values = _values(whole.qdata.numpy(), whole, scheme)
    error = (values - weight * factor).reshape(*losses.shape, -1)
    np.testing.assert_allclose((error**2).sum(-1), losses, rtol=1e-3)
