# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import numpy as np
import pytest
import torch
from operator_oracle import (
    UNIT,
    assert_integers,
    f64,
    ids_for,
    smooth_quantize_f64,
)

smooth_quantize = torch.ops.masquant.smooth_quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (1, 33), (2, 64), (7, 31), (64, 130)]


def inputs(
    tokens: int, width: int, modalities: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens * 1000 + width)
    x = torch.randn(tokens, width).to(dtype)
    pre_scale = torch.exp(torch.randn(modalities, width))
    return x, pre_scale, ids_for(tokens, modalities)


@pytest.mark.parametrize("act_bits", [8, 6, 4, 2])
@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    shape: tuple[int, int], modalities: int, act_bits: int
) -> None:
    x, pre_scale, ids = inputs(*shape, modalities)
    if not shape[0]:
        q, scale = smooth_quantize(x, pre_scale, ids, act_bits)
        assert q.shape == shape and scale.shape == (0, 1)
        return
    for given in (ids, None):
        q, scale = smooth_quantize(x, pre_scale, given, act_bits)
        assert q.dtype == torch.int8 and scale.dtype == torch.float32
        expected = smooth_quantize_f64(x, pre_scale, given, act_bits)
        assert_integers(q, expected)
        # One float32 product and one division.
        np.testing.assert_allclose(f64(scale), expected.scale, rtol=2.01 * UNIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 1e4])
@pytest.mark.parametrize("act_bits", [8, 4])
def test_shift(act_bits: int, size: float, dtype: torch.dtype) -> None:
    """Also one far larger than what is left of a token when it is taken off."""
    x, pre_scale, ids = inputs(16, 48, 3)
    shift = size * torch.randn(3, 48)
    x = ((x + shift[ids]) / pre_scale[ids]).clamp(-6e4, 6e4).to(dtype)
    for given in (ids, None):
        q, scale = smooth_quantize(x, pre_scale, given, act_bits, shift)
        expected = smooth_quantize_f64(x, pre_scale, given, act_bits, shift)
        # A shift of 1e4 leaves float32 eleven bits of a level.
        assert_integers(q, expected, ties=1.0 if size == 1e4 else 0.01)
        quant_max = 2 ** (act_bits - 1) - 1
        slack = expected.slack.max(-1, keepdims=True) * expected.scale / quant_max
        assert (np.abs(f64(scale) - expected.scale) <= slack).all()


def test_no_shift_is_a_shift_of_zero() -> None:
    x, pre_scale, ids = inputs(16, 48, 3)
    bare = smooth_quantize(x, pre_scale, ids, 8)
    for a, b in zip(bare, smooth_quantize(x, pre_scale, ids, 8, torch.zeros(3, 48))):
        assert torch.equal(a, b)


def test_a_token_that_the_shift_takes_whole() -> None:
    shift = torch.randn(1, 8)
    q, scale = smooth_quantize(shift.clone(), torch.ones(1, 8), None, 8, shift)
    assert not q.any() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_types(dtype: torch.dtype) -> None:
    """The types are widened exactly: nothing is rounded to 16 bits on the way."""
    x, pre_scale, ids = inputs(16, 48, 3, dtype)
    q, scale = smooth_quantize(x, pre_scale, ids, 8)
    expected = smooth_quantize_f64(x, pre_scale, ids, 8)
    assert_integers(q, expected)
    np.testing.assert_allclose(f64(scale), expected.scale, rtol=2.01 * UNIT)
    wide, wide_scale = smooth_quantize(x.float(), pre_scale, ids, 8)
    assert torch.equal(q, wide) and torch.equal(scale, wide_scale)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64, torch.uint8])
def test_types_of_ids(ids_dtype: torch.dtype) -> None:
    x, pre_scale, ids = inputs(9, 16, 3)
    q, scale = smooth_quantize(x, pre_scale, ids, 8)
    other_q, other_scale = smooth_quantize(x, pre_scale, ids.to(ids_dtype), 8)
    assert torch.equal(q, other_q) and torch.equal(scale, other_scale)


def test_no_ids_are_ids_of_zero() -> None:
    x, pre_scale, _ = inputs(9, 16, 3)
    zeros = torch.zeros(9, dtype=torch.int64)
    for a, b in zip(
        smooth_quantize(x, pre_scale, None, 8), smooth_quantize(x, pre_scale, zeros, 8)
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ids", [[0, 3, 1], [-1, 0, 1]])
def test_ids_out_of_range_raise(ids: list[int]) -> None:
    x, pre_scale, _ = inputs(3, 8, 3)
    with pytest.raises(IndexError):
        smooth_quantize(x, pre_scale, torch.tensor(ids), 8)


@pytest.mark.parametrize("act_bits", [8, 6, 4, 2])
def test_halves_round_to_even(act_bits: int) -> None:
    """A row whose maximum is quant_max has scale 1: its halves are exact ties."""
    quant_max = 2 ** (act_bits - 1) - 1
    halves = [h + 0.5 for h in range(-quant_max, quant_max)]
    x = torch.tensor([[float(quant_max), *halves]])
    q, scale = smooth_quantize(x, torch.ones_like(x), None, act_bits)
    assert scale.item() == 1.0
    # Python's round() rounds halves to even.
    assert q.tolist() == [[round(v) for v in x[0].tolist()]]


@pytest.mark.parametrize("act_bits", [8, 7, 6, 5, 4, 3, 2])
def test_range_is_symmetric_and_used(act_bits: int) -> None:
    x, pre_scale, ids = inputs(200, 64, 3)
    q, _ = smooth_quantize(x, pre_scale, ids, act_bits)
    quant_max = 2 ** (act_bits - 1) - 1
    assert (q.abs().amax(-1) == quant_max).all()
    assert q.min() == -quant_max and q.max() == quant_max


def test_a_row_of_zeros_gives_zeros() -> None:
    x, pre_scale, ids = inputs(4, 16, 3)
    x[2] = 0
    q, scale = smooth_quantize(x, pre_scale, ids, 8)
    assert (q[2] == 0).all()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    rest = [0, 1, 3]
    other_q, other_scale = smooth_quantize(x[rest], pre_scale, ids[rest], 8)
    assert torch.equal(q[rest], other_q) and torch.equal(scale[rest], other_scale)


def test_subnormal_inputs_stay_finite() -> None:
    """Below float32's normal range the scale stops shrinking: zeros, never nan."""
    q, scale = smooth_quantize(torch.full((1, 4), 1e-40), torch.ones(1, 4), None, 8)
    assert torch.isfinite(scale).all()
    error = (q * scale - 1e-40).abs().max().item()
    assert error <= torch.finfo(torch.float32).tiny / 2


def test_one_channel_of_ten_thousand() -> None:
    x, pre_scale, ids = inputs(6, 64, 3)
    pre_scale.fill_(1.0)
    x[:, 17] = 1e4
    q, scale = smooth_quantize(x, pre_scale, ids, 8)
    assert (q[:, 17] == 127).all()
    # |x| < 5 is below half of the step 1e4 / 127 = 79.
    others = torch.cat((q[:, :17], q[:, 18:]), 1)
    assert (others == 0).all()
    np.testing.assert_allclose(f64(scale), 1e4 / 127, rtol=2.01 * UNIT)
    # Smoothing is what takes it back.
    pre_scale[:, 17] = 1e-4
    q, _ = smooth_quantize(x, pre_scale, ids, 8)
    assert_integers(q, smooth_quantize_f64(x, pre_scale, ids, 8))
    assert (q != 0).float().mean() > 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_shows_and_stays_alone(value: float) -> None:
    x, pre_scale, ids = inputs(5, 16, 3)
    clean_q, clean_scale = smooth_quantize(x, pre_scale, ids, 8)
    x[3, 5] = value
    q, scale = smooth_quantize(x, pre_scale, ids, 8)
    # The integers of a broken row mean nothing, so its scale must not be finite.
    assert not torch.isfinite(scale[3]).any()
    assert not torch.isfinite(q[3].float() * scale[3]).any()
    rest = [0, 1, 2, 4]
    assert torch.equal(q[rest], clean_q[rest])
    assert torch.equal(scale[rest], clean_scale[rest])


def strided_inputs(kind: str) -> torch.Tensor:
    torch.manual_seed(3)
    if kind == "transposed":
        return torch.randn(32, 9).t()
    if kind == "every other column":
        return torch.randn(9, 64)[:, ::2]
    if kind == "every other row":
        return torch.randn(18, 32)[::2]
    return torch.randn(1, 32).expand(9, 32)


STRIDED = ["transposed", "every other column", "every other row", "expanded"]


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("with_ids", [False, True])
def test_non_contiguous_input(kind: str, with_ids: bool) -> None:
    x = strided_inputs(kind)
    assert not x.is_contiguous()
    _, pre_scale, ids = inputs(9, 32, 3)
    given = ids if with_ids else None
    q, scale = smooth_quantize(x, pre_scale, given, 8)
    other_q, other_scale = smooth_quantize(x.contiguous(), pre_scale, given, 8)
    assert torch.equal(q, other_q) and torch.equal(scale, other_scale)
    # What the fake implementation promises to the compiler.
    assert q.is_contiguous() and scale.is_contiguous()


@pytest.mark.parametrize("exponent", [-12, -1, 1, 20])
@pytest.mark.parametrize("act_bits", [8, 6, 4])
def test_a_power_of_two_changes_no_integer(act_bits: int, exponent: int) -> None:
    """The gauge: a constant factor on one modality's smoothing is in its scales."""
    x, pre_scale, ids = inputs(24, 40, 3)
    q, scale = smooth_quantize(x, pre_scale, ids, act_bits)
    scaled = pre_scale.clone()
    scaled[1] *= 2.0**exponent
    other_q, other_scale = smooth_quantize(x, scaled, ids, act_bits)
    assert torch.equal(q, other_q)
    factor = torch.where(ids == 1, 2.0**exponent, 1.0)[:, None]
    assert torch.equal(other_scale, scale * factor)


@pytest.mark.parametrize("constant", [0.3, 1.7, 1e3])
@pytest.mark.parametrize("act_bits", [8, 6, 4])
def test_any_constant_changes_ties_only(act_bits: int, constant: float) -> None:
    x, pre_scale, ids = inputs(24, 40, 3)
    expected = smooth_quantize_f64(x, pre_scale, ids, act_bits)
    q, _ = smooth_quantize(x, pre_scale, ids, act_bits)
    scaled = pre_scale.clone()
    scaled[1] *= constant
    other_q, _ = smooth_quantize(x, scaled, ids, act_bits)
    # One more rounding, of the product with the constant, in level and in scale.
    near = np.abs(np.abs(expected.levels) % 1 - 0.5) <= 6 * UNIT * 128
    changed = (q != other_q).numpy()
    assert not (changed & ~near).any()
    assert not changed[(ids != 1).numpy()].any()
    assert near.mean() < 0.01
