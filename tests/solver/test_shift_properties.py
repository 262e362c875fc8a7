# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a shift and a gauge leave as it is, on any data."""

import group_oracle
import numpy as np
import pytest
import torch
from group_oracle import data, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.options import SolverOptions, get_scheme
from torchao_masquant.solver.layers import solve_group

UNIT = 2.0**-24

FIXED = {"alpha": 0.5, "separation": 1.0, "rank": 2}
FREE = {"alpha": "auto", "separation": "auto"}


def _solve(tokens, weights, **options):
    return solve_group(weights, statistics(tokens), SolverOptions(**FIXED | options))


def _masquant_linear(layer, weight, x, index, scheme, low_rank_bits=16):
    quantized = layer.quantize(
        weight, get_scheme(scheme), group_oracle.NAMES[:3], low_rank_bits
    )
    ids = torch.full((len(x),), index)
    return torch.ops.masquant.linear(x, quantized, ids, None).double().numpy()


@pytest.mark.parametrize("scheme, low_rank_bits", [("w8a8", 8), ("w3a3", 16)])
def test_shift_and_bias_are_the_center_and_its_product(scheme, low_rank_bits):
    tokens, weights = data()
    layers = _solve(tokens, weights, scheme=scheme, low_rank_bits=low_rank_bits)
    for name, layer in layers.items():
        for index, x in enumerate(tokens):
            mean = group_oracle.center(x)
            factor = layer.smoothing_factor[index].double().numpy()
            # Two roundings to float32: of the factor and of the shift.
            np.testing.assert_allclose(
                layer.act_shift[index].double().numpy(), mean / factor, rtol=3 * UNIT
            )
            np.testing.assert_allclose(
                layer.modality_bias[index].double().numpy(),
                weights[name].double().numpy() @ mean,
                rtol=2 * UNIT,
                atol=1e-12,
            )


@pytest.mark.parametrize(
    "scheme, constant", [("w8a8", True), ("w4a8", False), ("w3a3", True)]
)
def test_the_center_of_a_modality_comes_out_exact(scheme, constant):
    """Whatever the bits: a modality that is constant loses nothing at all."""
    tokens, weights = data()
    if constant:
        tokens = [x.mean(0).expand_as(x).contiguous() for x in tokens]
    layers = _solve(tokens, weights, scheme=scheme)
    for name, layer in layers.items():
        for index, x in enumerate(tokens):
            mean = torch.from_numpy(group_oracle.center(x)).float()[None]
            y = _masquant_linear(layer, weights[name], mean, index, scheme)
            exact = mean.double().numpy() @ weights[name].double().numpy().T
            # Float32 leaves of ``x p - o`` a few units of ``o``, from the product, its
            # factor and the mean itself; the largest is rounded to one of the levels.
            shift = layer.act_shift[index].double().numpy()
            matrix = np.abs(
                group_oracle.grid_weight(layer, weights[name], get_scheme(scheme))
            )
            if index and layer.ranks and layer.ranks[index - 1]:
                start = sum(layer.ranks[: index - 1])
                own = slice(start, start + layer.ranks[index - 1])
                l1, l2 = layer.l1[:, own].double(), layer.l2[own].double()
                matrix = matrix + (l1.abs() @ l2.abs()).t().numpy()
            residual = 5 * UNIT * (np.abs(shift) + np.abs(shift).max())
            bound = matrix @ residual + 4 * UNIT * np.abs(exact) + 1e-9
            assert (np.abs(y - exact) <= bound).all()
            if constant:
                assert _relative(y, exact) < 1e-5


def _relative(y, exact):
    return np.linalg.norm(y - exact) / np.linalg.norm(exact)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["w4a8", "w4a4", "w8a8"]),
    st.sampled_from([-200, -3, 2, 64]),
)
def test_a_constant_that_is_added_changes_nothing_but_the_bias(seed, scheme, size):
    """Means do not reach the integers, the factors or the pairs."""
    tokens, weights = data(2, seed)
    generator = torch.Generator().manual_seed(seed)
    k = tokens[0].shape[1]
    # No channel's variation may fall below bfloat16's grain of its size, 2^-8 of it.
    least = min(x.std(0).min().item() for x in tokens)
    size = max(-64 * least, min(size, 64 * least))
    constants = (size * torch.rand(2, k, generator=generator)).round()
    moved = [x + c for x, c in zip(tokens, constants)]
    first = _solve(tokens, weights, scheme=scheme)
    second = _solve(moved, weights, scheme=scheme)
    for name, layer in first.items():
        other = second[name]
        factors = layer.smoothing_factor, other.smoothing_factor
        torch.testing.assert_close(*factors, rtol=1e-6, atol=0)
        # A covariance less its means' square: 1e-11 of noise may cross a boundary.
        assert (layer.qdata != other.qdata).float().mean() < 0.01
        added = constants.double() @ weights[name].double().t()
        torch.testing.assert_close(
            other.modality_bias.double() - layer.modality_bias.double(),
            added,
            rtol=1e-5,
            atol=1e-5,
        )


# What a gauge leaves of the integers of activations.


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(1e-6, 1e6),
    st.integers(-20, 20),
    st.integers(2, 8),
    st.booleans(),
)
def test_any_positive_constant_gives_the_same_integers(
    seed, constant, power, bits, shifted
):
    """``Q(c (x / s - o))``: only its scale knows c."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 16, generator=generator)
    pre_scale = torch.rand(2, 16, generator=generator) + 0.1
    shift = torch.randn(2, 16, generator=generator) if shifted else None
    ids = torch.arange(9) % 2
    quantize = torch.ops.masquant.smooth_quantize

    def run(c):
        moved = None if shift is None else shift * c
        return quantize(x, pre_scale * c, ids, bits, moved)

    first, scale = run(1.0)
    # A power of two is exact in all of it.
    same, scaled = run(2.0**power)
    assert torch.equal(same, first) and torch.equal(scaled, scale * 2.0**power)
    # Any other one moves a value by a few float32 roundings of its parts.
    other, scaled = run(constant)
    torch.testing.assert_close(scaled, scale * constant, rtol=1e-5, atol=0)
    v = x.double() * pre_scale[ids].double()
    size = v.abs()
    if shift is not None:
        v, size = v - shift[ids].double(), size + shift[ids].abs().double()
    step = v.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = v / step
    slack = 8 * UNIT * (size + size.amax(1, keepdim=True)) / step
    near = (levels - levels.floor() - 0.5).abs() <= slack
    assert ((other == first) | near).all()
    assert ((other.int() - first.int()).abs() <= near.int()).all()
