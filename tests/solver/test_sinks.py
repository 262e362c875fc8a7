# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Few tokens a thousand times as loud as the others: told from those, and served too."""

import group_oracle
import numpy as np
import pytest
import torch
from group_oracle import statistics

from torchao_masquant.options import SolverOptions, get_scheme
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.modality_input import modality_inputs, ordinary

K, N, TOKENS, EVERY, CHANNEL = 64, 48, 2000, 200, 5


def _tokens(sinks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, K, generator=generator) + torch.linspace(-2, 2, K)
    loud = torch.arange(TOKENS) % EVERY == 0
    if sinks:
        x[loud, CHANNEL] = 1000 + 30 * torch.randn(int(loud.sum()), generator=generator)
    return x, loud


def _solved(x, scheme, **options):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / 8
    options = SolverOptions(scheme, **options)
    found = statistics([x])
    layer = solve_group({"q": weight}, found, options)["q"]
    return weight, layer, modality_inputs(found, options)[0], found.moments[0].sample


def _errors(x, weight, layer, scheme):
    """(T,) of each token's output, relative to that of a token's usual size."""
    exact = x.double().numpy() @ weight.double().numpy().T
    y = group_oracle.output(layer, weight, x, 0, get_scheme(scheme))
    return np.linalg.norm(y - exact, axis=1), np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4"])
def test_they_move_no_center_and_cost_others_nothing(scheme):
    """The shift is that of the other tokens, and so is, to a tenth, their error."""
    x, loud = _tokens(sinks=True)
    weight, layer, seen, sample = _solved(x, scheme)
    assert not ordinary(sample.double())[sample[:, CHANNEL] > 500].any()
    assert (sample[:, CHANNEL] > 500).any() and len(sample) < TOKENS
    center = group_oracle.center(sample)
    np.testing.assert_allclose(seen.center.numpy(), center, rtol=1e-9)
    # Of some 250 tokens of variance 1; the mean of all is 5 off.
    assert abs(center[CHANNEL] - x[~loud, CHANNEL].mean().item()) < 5 / 250**0.5
    # Covariances hear all tokens, about that center.
    left = x.double().numpy() - center
    np.testing.assert_allclose(
        seen.covariance.numpy(), left.T @ left / TOKENS, atol=1e-9 * 1e6 / EVERY
    )
    quiet, _ = _tokens(sinks=False)
    _, plain, *_ = _solved(quiet, scheme)
    errors, sizes = _errors(x, weight, layer, scheme)
    without, _ = _errors(quiet, weight, plain, scheme)
    ordinary_error = np.sqrt((errors[~loud] ** 2).mean())
    assert ordinary_error < 1.1 * np.sqrt((without[~loud] ** 2).mean())
    # A sink is one token of its own scale: half a step of its largest channel, rotated.
    bits = get_scheme(scheme)
    levels = 2 ** (bits.act_bits - 1) - 1
    assert (errors[loud] / sizes[loud]).max() < 4 / levels + 2.0 ** (
        1 - bits.weight_bits
    )


def test_what_more_than_one_in_ten_is_like_is_no_sink():
    """A mode of three tokens in ten, a hundred times as far as the others are wide."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, K, generator=generator)
    x[torch.arange(200) % 10 < 3, CHANNEL] += 100
    assert ordinary(x.double()).all() and group_oracle.ordinary(x.numpy()).all()
    _, layer, seen, _ = _solved(x, "w8a8")
    # All tokens are known: the mean is that of all of them.
    np.testing.assert_allclose(
        seen.center.numpy(), x.double().numpy().mean(0), rtol=1e-12, atol=1e-12
    )
    assert layer.act_shift[0, CHANNEL] > 0


@pytest.mark.parametrize("kind", ["constant", "one", "two", "zeros"])
def test_tokens_that_are_all_ordinary(kind):
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(3)).double()
    x = {"constant": x[:1].expand(50, K), "one": x[:1], "two": x[:2], "zeros": 0 * x}[
        kind
    ]
    assert ordinary(x).all()


def test_what_is_constant_among_sinks_has_no_variance():
    """Rounding that a center is off by is no signal for whitening to blow up."""
    vision = torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(4))
    vision[:, 7] = 1000 + 1e-4 * vision[:, 7]
    vision[::EVERY, CHANNEL] = 1000
    found = modality_inputs(statistics([vision]), SolverOptions())[0]
    assert not found.covariance[7].any() and found.covariance[CHANNEL, CHANNEL] > 1e3
