# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

from typing import Any, Optional

import numpy as np
import pytest
import torch
from operator_oracle import assert_within, ids_for, int_linear_f64

int_linear = torch.ops.masquant.int_linear

SHAPES = [(0, 8, 5), (1, 1, 1), (1, 33, 7), (5, 31, 3), (17, 64, 32), (33, 130, 65)]


def packed(values: np.ndarray) -> torch.Tensor:
    """Two nibbles a byte, low one first, written without the package."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    nibbles = values.astype(np.uint8) & 15
    return torch.from_numpy((nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).astype("uint8"))


def integers(
    tokens: int, in_features: int, out_features: int, weight_bits: int
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Activations, weights and the weights as the operator wants them."""
    rng = np.random.default_rng(in_features)
    qx = torch.from_numpy(
        rng.integers(-127, 128, (tokens, in_features)).astype(np.int8)
    )
    least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1)
    weight = rng.integers(least, most, (out_features, in_features)).astype(np.int8)
    stored = packed(weight) if weight_bits <= 4 else torch.from_numpy(weight)
    return qx, weight, stored


@pytest.mark.parametrize("weight_bits", [8, 4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_part_is_exact(shape: tuple[int, int, int], weight_bits: int) -> None:
    """Scales of one: K * 127 * 128 stays below 2 ** 24, where float32 is exact."""
    qx, weight, stored = integers(*shape, weight_bits)
    y = int_linear(
        qx,
        torch.ones(shape[0], 1),
        stored,
        torch.ones(shape[2], 1),
        None,
        None,
        None,
        None,
        None,
        weight_bits,
        torch.float32,
    )
    exact = qx.numpy().astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(y.numpy().astype(np.int64), exact)


def test_extreme_integers_do_not_overflow() -> None:
    """4096 products of -127 * -128: 2 ** 26, far over int8, int16 and 2 ** 24."""
    qx = torch.full((3, 4096), -127, dtype=torch.int8)
    weight = torch.full((5, 4096), -128, dtype=torch.int8)
    y = int_linear(
        qx,
        torch.ones(3, 1),
        weight,
        torch.ones(5, 1),
        None,
        None,
        None,
        None,
        None,
        8,
        torch.float32,
    )
    # 127 * 2 ** 19 has 7 significant bits.
    assert (y == 127 * 128 * 4096).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "parts", ["bare", "bias", "pair", "int8 pair", "modality bias", "all"]
)
def test_against_float64(
    parts: str, groups: int, weight_bits: int, out_dtype: torch.dtype
) -> None:
    tokens, in_features, out_features, rank = 21, 60, 13, 6
    torch.manual_seed(0)
    qx, weight, stored = integers(tokens, in_features, out_features, weight_bits)
    x_scale = torch.rand(tokens, 1) / 127
    scale = torch.rand(out_features, groups) / 2**weight_bits
    ids = ids_for(tokens, 3)
    hidden: Optional[torch.Tensor] = None
    l2 = modality_bias = bias = None
    if parts in ("pair", "all"):
        hidden, l2 = (
            torch.randn(tokens, rank),
            torch.randn(rank, out_features).to(
                torch.float16 if out_dtype == torch.float16 else torch.bfloat16
            ),
        )
    if parts == "int8 pair":
        hidden = torch.randn(tokens, rank) / 127
        l2 = torch.randint(-127, 128, (rank, out_features), dtype=torch.int8)
    if parts in ("modality bias", "all"):
        modality_bias = torch.randn(3, out_features)
    if parts in ("bias", "all"):
        bias = torch.randn(out_features).to(out_dtype)
    terms: list[Any] = [scale, hidden, l2, modality_bias, ids, bias]
    y = int_linear(qx, x_scale, stored, *terms, weight_bits, out_dtype)
    assert y.dtype == out_dtype
    expected, size = int_linear_f64(qx, x_scale, weight, *terms)
    # Of a group: conversion, two scales, its sum; R products and sums of the pair;
    # three sums of the terms.
    assert_within(y, expected, size, 3 + groups + rank + 1 + 3)


@pytest.mark.parametrize("shape", [(0, 12, 5), (1, 12, 1), (5, 36, 7)], ids=str)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_groups_of_odd_width(shape: tuple[int, int, int], weight_bits: int) -> None:
    """Groups of 3: a group may begin in the middle of a byte."""
    qx, weight, stored = integers(*shape, weight_bits)
    groups = shape[1] // 3
    x_scale, scale = torch.rand(shape[0], 1), torch.rand(shape[2], groups)
    terms: list[Any] = [scale, None, None, None, None, None]
    y = int_linear(qx, x_scale, stored, *terms, weight_bits, torch.float32)
    expected, size = int_linear_f64(qx, x_scale, weight, *terms)
    assert_within(y, expected, size, 3 + groups)


def test_modality_bias_of_the_base_without_ids() -> None:
    """A base-only call adds the first row, and so do base tokens of a mixed call."""
    qx, weight, stored = integers(6, 16, 5, 8)
    x_scale, scale = torch.rand(6, 1), torch.rand(5, 1)
    modality_bias = torch.tensor([[0.0], [1e6], [2e6]]).expand(3, 5)
    rest = (8, torch.float32)
    bare = int_linear(qx, x_scale, stored, scale, None, None, None, None, None, *rest)
    without_ids = int_linear(
        qx, x_scale, stored, scale, None, None, modality_bias, None, None, *rest
    )
    assert torch.equal(bare, without_ids)
    ids = torch.tensor([0, 1, 2, 0, 2, 1])
    mixed = int_linear(
        qx, x_scale, stored, scale, None, None, modality_bias, ids, None, *rest
    )
    assert torch.equal(mixed[ids == 0], bare[ids == 0])
    assert (mixed[ids > 0] > 9e5).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_non_contiguous_operands(groups: int) -> None:
    qx, weight, stored = integers(9, 16, 5, 8)
    x_scale, scale = torch.rand(9, 1), torch.rand(5, groups)
    rest = (None, None, None, None, None, 8, torch.float32)
    expected = int_linear(qx, x_scale, stored, scale, *rest)
    wide = torch.stack((stored, stored), -1)[..., 0]
    assert not wide.is_contiguous()
    y = int_linear(
        qx.t().contiguous().t(), x_scale, wide, scale.t().contiguous().t(), *rest
    )
    assert torch.equal(y, expected)
    assert y.is_contiguous()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [1, 4])
def test_default_dtype_has_no_say(groups: int, default: torch.dtype) -> None:
    """transformers loads models under another default type: sums stay in float32."""
    qx, weight, stored = integers(9, 64, 5, 8)
    x_scale, scale = torch.rand(9, 1), torch.rand(5, groups)
    rest = (None, None, None, None, None, 8, torch.float32)
    expected = int_linear(qx, x_scale, stored, scale, *rest)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        y = int_linear(qx, x_scale, stored, scale, *rest)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, expected)


def test_a_broken_token_stays_alone() -> None:
    qx, weight, stored = integers(5, 16, 4, 8)
    x_scale, scale = torch.rand(5, 1), torch.rand(4, 1)
    hidden, l2 = torch.randn(5, 3), torch.randn(3, 4)
    ids = torch.tensor([0, 1, 1, 0, 1])
    rest = (None, ids, None, 8, torch.float32)
    clean = int_linear(qx, x_scale, stored, scale, hidden, l2, *rest)
    x_scale[2], hidden[2] = float("nan"), float("nan")
    y = int_linear(qx, x_scale, stored, scale, hidden, l2, *rest)
    assert torch.isnan(y[2]).all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])
