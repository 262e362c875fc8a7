# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Solutions in rotated channels, run as models run them; also where inputs are ugly."""

import numpy as np
import pytest
import torch
from group_oracle import NAMES, data, statistics
from hadamard_oracle import hadamard_f64

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.rotation import rotated, rotated_both

DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("k", "size"), [(2, 2), (12, 4), (96, 32), (160, 16), (640, 128), (1024, 512)]
)
def test_rotated_is_what_the_kernels_do(k, size):
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(3, 5, k, generator=generator, dtype=DOUBLE)
    found = rotated(rows, size)
    torch.testing.assert_close(
        found, hadamard_rotate(rows, size), rtol=1e-12, atol=1e-12
    )
    exact = rows.numpy() @ hadamard_f64(k, size)
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-12)
    assert rotated(rows, None) is rows
    matrix = rows[0].t() @ rows[0]
    expected = hadamard_f64(k, size) @ matrix.numpy() @ hadamard_f64(k, size)
    np.testing.assert_allclose(
        rotated_both(matrix, size).numpy(), expected, rtol=0, atol=1e-10
    )


def _outliers(k):
    """Tokens of two modalities, loud in a few channels of theirs, and a wide weight."""
    generator = torch.Generator().manual_seed(k)
    tokens = [torch.randn(250, k, generator=generator) for _ in range(2)]
    for index, x in enumerate(tokens):
        x[:, index : k : k // 5] *= 40
        x += 3 * index
    return tokens, torch.randn(k // 2, k, generator=generator) / k**0.5


def _error(layer, weight, tokens, options):
    """Of each modality's output as a model makes it, relative to what varies in it."""
    quantized = layer.quantize(weight, options.number_format, NAMES[: len(tokens)])
    found = []
    for index, x in enumerate(tokens):
        y = torch.ops.masquant.linear(x, quantized, torch.full((len(x),), index), None)
        exact = x.double() @ weight.double().t()
        signal = (exact - exact.mean(0)).norm()
        found.append(((y.double() - exact).norm() / signal).item())
    return found


@pytest.mark.parametrize(
    ("scheme", "most", "separation"),
    [("w8a8", 0.03, 0.0), ("w4a8", 0.1, 1.0), ("w4a4", 0.2, 0.0), ("w4a4", 0.2, 1.0)],
)
def test_outlier_channels_are_spread_over_blocks(scheme, most, separation):
    """Three blocks; better than without a rotation in every modality at 4 bits."""
    tokens, weight = _outliers(96)
    errors = {}
    for size in (None, 1):
        options = SolverOptions(
            scheme, rank=16, separation=separation, hadamard_size=size
        )
        layer = solve_group({"q": weight}, statistics(tokens), options)["q"]
        assert layer.hadamard_size == (32 if size is None else None)
        errors[size] = _error(layer, weight, tokens, options)
    assert max(errors[None]) < most
    if scheme == "w4a4":
        assert all(a < b for a, b in zip(errors[None], errors[1]))


def _of_zeros(tokens):
    for x in tokens:
        x[:, 3] = 0
    return tokens


UGLY = {
    "a channel of zeros": _of_zeros,
    "one token": lambda tokens: [tokens[0], tokens[1][:1]],
    "constant": lambda tokens: [tokens[0], tokens[1][:1].expand(160, -1).contiguous()],
    "constant base": lambda tokens: [
        tokens[0][:1].expand(160, -1).contiguous(),
        tokens[1],
    ],
}


@pytest.mark.parametrize(
    ("separation", "dtype"), [(0.0, torch.bfloat16), (1.0, torch.float16)]
)
@pytest.mark.parametrize("kind", UGLY)
def test_ugly_tokens(kind, separation, dtype):
    """Finite, and right to what 8 bits leave where tokens vary at all."""
    tokens, weights = data(2)
    tokens = UGLY[kind]([x.clone() for x in tokens])
    weights = {name: w.to(dtype) for name, w in weights.items()}
    # Factors of their own need pairs, which make up for the difference.
    options = SolverOptions("w8a8", rank=24, separation=separation)
    layers = solve_group(weights, statistics(tokens), options)
    for name, layer in layers.items():
        layer.check(name, 2)
        assert all(torch.isfinite(t).all() for t in layer.tensors().values())
        for index, x in enumerate(tokens):
            weight = weights[name].float()
            quantized = layer.quantize(weight, options.number_format, NAMES[:2])
            ids = torch.full((len(x),), index)
            y = torch.ops.masquant.linear(x, quantized, ids, None).double()
            exact = x.double() @ weight.double().t()
            assert (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("k", [2, 7, 12])
def test_narrow_inputs(k):
    """Odd widths are not rotated; two channels are one block."""
    generator = torch.Generator().manual_seed(k)
    tokens = [torch.randn(160, k, generator=generator) + m for m in range(2)]
    weight = torch.randn(5, k, generator=generator)
    options = SolverOptions("w8a8", rank=1)
    layer = solve_group({"q": weight}, statistics(tokens), options)["q"]
    assert layer.hadamard_size == {2: 2, 7: None, 12: 4}[k]
    assert max(_error(layer, weight, tokens, options)) < 0.02
