# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Making a MASQuantTensor, and reading it back."""

import re
from typing import Any, Optional

import expecttest
import numpy as np
import pytest
import torch
from tensor_oracle import (
    NAMES,
    OUT,
    SCHEMES,
    UNIT,
    f64,
    integers,
    make,
    pair_f64,
    smoothed_f64,
    unrouted,
)

from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    dequantize_smoothed_weight,
    low_rank_dtype,
    quantize_smoothed_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 2), (3, 2), (5, 33), (6, 16), (32, 128)]


def assert_quantized(
    tensor: MASQuantTensor, weight: torch.Tensor, smoothing_factor: torch.Tensor
) -> None:
    """``q = round(W s_0 / scale) + z``, with torchao's scales and zero points.

    ``scale = max |W s_0| / (2 ** bits - 1) * 2`` and ``z = 0`` where symmetric, else
    ``scale = (max - min) / (2 ** bits - 1)`` of a range with zero in it, and
    ``z = q_min - round(min / scale)``.
    """
    bits = tensor.weight_bits
    groups = tensor.scale.shape[1]
    smoothed = f64(weight) * f64(smoothing_factor)[0]
    grouped = smoothed.reshape(weight.shape[0], groups, -1)
    low, high = grouped.min(-1).clip(max=0), grouped.max(-1).clip(min=0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero_point = np.zeros_like(low)
    if tensor.zero_point is None:
        scale = np.maximum(-low, high) / ((2**bits - 1) / 2)
    else:
        scale = (high - low) / (2**bits - 1)
        zero_point = tensor.zero_point.numpy().astype(float)
        assert tensor.zero_point.dtype == torch.int8
        assert zero_point.min() >= least and zero_point.max() <= most
        # Behind the quotient: 2 roundings of the weight, 4 of the scale, its own.
        off = np.abs(zero_point - (least - low / scale))
        assert (off <= 0.5 + 7 * UNIT * np.abs(low / scale)).all()
    # Two reciprocals' worth of rounding in W / (1 / s), one in the difference of the
    # range's ends, one in the division.
    np.testing.assert_allclose(f64(tensor.scale), scale, rtol=4.01 * UNIT)
    levels = (grouped / scale[..., None]).reshape(smoothed.shape)
    shift = np.repeat(zero_point, smoothed.shape[1] // groups, axis=1)
    q = integers(tensor)
    # Behind a level: 2 roundings of the weight, 4 of the scale, its reciprocal and
    # their product.
    slack = 8 * UNIT * np.abs(levels)
    tie = np.abs(levels - np.floor(levels) - 0.5) <= slack
    wrong = (q != np.clip(np.round(levels) + shift, least, most)) & ~tie
    assert not wrong.any(), (q[wrong], levels[wrong])
    error = np.abs(q - np.clip(levels + shift, least, most))
    assert (error <= 0.5 + 8 * UNIT * 256).all()
    # The largest weight of a symmetric group is a tie by construction:
    # +-(2 ** bits - 1) / 2.
    assert tie.sum() <= groups * weight.shape[0] + 0.01 * tie.size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_and_scales(
    scheme: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    case = make(scheme, shape=shape, dtype=dtype)
    assert_quantized(case.tensor, case.weight, case.smoothing_factor)
    t = case.tensor
    assert t.shape == shape and t.dtype == dtype
    assert (t.weight_bits, t.act_bits) == SCHEMES[scheme]
    assert t.scale.dtype == t.act_pre_scale.dtype == torch.float32
    np.testing.assert_allclose(
        f64(t.act_pre_scale), 1 / f64(case.smoothing_factor), rtol=UNIT
    )
    np.testing.assert_array_equal(t.int_data().numpy(), integers(t))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_single_input_channel_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 1\) has too few input channels"):
        make(scheme, shape=(4, 1))


@pytest.mark.parametrize("group_size", [2, 3, 6, 12, 24])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_groups(scheme: str, group_size: int) -> None:
    case = make(scheme, shape=(5, 24), group_size=group_size)
    assert case.tensor.scale.shape == (5, 24 // group_size)
    assert case.tensor.group_size == group_size
    assert_quantized(case.tensor, case.weight, case.smoothing_factor)


@pytest.mark.parametrize("group_size", [None, 4])
def test_a_non_contiguous_weight(group_size: Optional[int]) -> None:
    case = make(shape=(8, 8), ranks=(), group_size=group_size)
    weight = case.weight.t().contiguous().t()
    assert not weight.is_contiguous()
    tensor = MASQuantTensor.from_hp(
        weight,
        modalities=NAMES[:3],
        smoothing_factor=case.smoothing_factor,
        group_size=group_size,
    )
    assert torch.equal(tensor.qdata, case.tensor.qdata)
    assert torch.equal(tensor.scale, case.tensor.scale)


def test_rows_of_zeros() -> None:
    weight = torch.randn(4, 16)
    weight[1] = 0
    for bits in (8, 4, 3):
        for symmetric in (True, False):
            tensor = MASQuantTensor.from_hp(
                weight, weight_bits=bits, act_bits=16, symmetric=symmetric
            )
            assert (smoothed_f64(tensor)[1] == 0).all()
            assert (tensor.dequantize()[1] == 0).all()
            assert torch.isfinite(tensor.scale).all() and (tensor.scale > 0).all()


def test_without_smoothing() -> None:
    """Plain round-to-nearest: factors of one, shared by all modalities."""
    tensor = MASQuantTensor.from_hp(torch.randn(4, 8), modalities=NAMES[:3])
    assert torch.equal(tensor.act_pre_scale, torch.ones(1, 8))
    assert not tensor.is_routed
    assert make().tensor.is_routed and not unrouted().is_routed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [(), (2, 3), (0, 4), (5, 0)], ids=str)
def test_dequantize(
    ranks: tuple[int, ...],
    scheme: str,
    group_size: Optional[int],
    dtype: torch.dtype,
) -> None:
    t = make(scheme, ranks=ranks, group_size=group_size, dtype=dtype).tensor
    for index, name in enumerate((None, *NAMES[1:3])):
        down, up = pair_f64(t, index)
        expected = (smoothed_f64(t) + (down @ up).T) * f64(t.act_pre_scale)[index]
        size = np.abs(smoothed_f64(t)) + (np.abs(down) @ np.abs(up)).T
        size *= f64(t.act_pre_scale)[index]
        for output_dtype in (None, torch.float32, torch.bfloat16):
            actual = t.dequantize(output_dtype, name)
            assert actual.dtype == (output_dtype or dtype)
            unit, smallest = OUT[actual.dtype]
            # The scale's product, r products and sums of the pair, a sum, a product.
            tolerance = (4 + down.shape[1]) * UNIT * size + unit * np.abs(expected)
            error = np.abs(f64(actual) - expected)
            assert (error <= tolerance * (1 + unit) + smallest).all()
    assert torch.equal(t.dequantize(), t.dequantize(modality="text"))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_dequantized_weight_is_near_the_original(scheme: str) -> None:
    """Half a step from it at most; the largest positive weights one whole half more."""
    case = make(scheme, shape=(16, 64))
    t = case.tensor
    step = f64(t.scale) * f64(t.act_pre_scale)[0]
    error = np.abs(f64(t.dequantize()) - f64(case.weight))
    assert (error <= 0.5 * step * (1 + 1e-4)).all()


def test_a_pair_that_holds_the_difference_gives_the_modality_its_own_weight() -> None:
    """``L1 L2 = (W s_m - Q(W s_0))^T`` in full rank: dequantize gives W back."""
    torch.manual_seed(0)
    weight, factors = torch.randn(6, 8), torch.rand(2, 8) + 0.5
    q = MASQuantTensor.from_hp(weight, weight_bits=4, smoothing_factor=factors[:1])
    shared = torch.from_numpy(smoothed_f64(q))
    difference = (weight * factors[1] - shared).t()
    u, s, vh = torch.linalg.svd(difference.double(), full_matrices=False)
    tensor = MASQuantTensor.from_hp(
        weight,
        weight_bits=4,
        modalities=NAMES[:2],
        smoothing_factor=factors,
        ranks=(6,),
        l1=u * s,
        l2=vh,
    )
    error = (tensor.dequantize(modality="vision") - weight).abs() * factors[1]
    # bfloat16 pairs: two relative errors of 2 ** -9, of the magnitudes of the terms.
    bound = 2.1 * 2.0**-9 * ((u * s).abs() @ vh.abs()).t()
    assert (error <= bound + 1e-6).all()
    assert (tensor.dequantize() - weight).abs().max() > 0.05


@pytest.mark.parametrize(
    "dtype, held",
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_pairs_have_16_bits_and_biases_32(
    dtype: torch.dtype, held: torch.dtype
) -> None:
    assert low_rank_dtype(dtype) == held
    case = make(dtype=dtype)
    assert case.l1 is not None and case.l2 is not None
    assert torch.equal(case.tensor.l1, case.l1.to(held))
    assert torch.equal(case.tensor.l2, case.l2.to(held))
    assert case.tensor.modality_bias.dtype == torch.float32
    assert torch.equal(case.tensor.modality_bias, case.modality_bias)


def test_smoothing_factor_is_given_back() -> None:
    case = make()
    # Two reciprocals.
    np.testing.assert_allclose(
        f64(case.tensor.smoothing_factor), f64(case.smoothing_factor), rtol=2.01 * UNIT
    )


@pytest.mark.parametrize(
    "scheme, shape, group_size, bytes_stored",
    [
        # integers + scales + pre-scales and shifts + pair in 16 bits + modality bias
        ("w8a8", (6, 16), None, 96 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        ("w4a8", (6, 16), None, 48 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        ("w4a8", (6, 15), None, 48 + 24 + 2 * 180 + 2 * 5 * 21 + 72),
        ("w4a8", (6, 16), 4, 48 + 96 + 2 * 192 + 2 * 5 * 22 + 72),
        ("w3a3", (6, 16), None, 48 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        # and zero points, but no shifts
        ("w4a16", (6, 16), 4, 48 + 96 + 192 + 2 * 5 * 22 + 72 + 24),
    ],
)
def test_nbytes_stored(
    scheme: str, shape: tuple[int, int], group_size: Optional[int], bytes_stored: int
) -> None:
    t = make(scheme, shape=shape, group_size=group_size).tensor
    assert t.nbytes_stored == bytes_stored
    assert t.nbytes == bytes_stored and t.numel() == shape[0] * shape[1]


def test_nbytes_of_a_weight_without_a_pair() -> None:
    assert unrouted("w4a8", shape=(6, 16)).nbytes_stored == 48 + 24 + 64


def test_nbytes_of_a_pair_of_8_bits() -> None:
    """Half of 16 bits, and a float32 scale per component."""
    wide, narrow = make(), make(low_rank_bits=8)
    saved = wide.tensor.nbytes_stored - narrow.tensor.nbytes_stored
    assert saved == 5 * 22 - 4 * 5
    assert (wide.tensor.low_rank_bits, narrow.tensor.low_rank_bits) == (16, 8)


WEIGHT = torch.ones(6, 8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "3-D weight",
        dict(hp_tensor=torch.ones(2, 6, 8)),
        "MASQuantTensor.from_hp takes a 2-D weight (N, K), got shape (2, 6, 8).",
    ),
    (
        "integer weight",
        dict(hp_tensor=torch.ones(6, 8, dtype=torch.int8)),
        "MASQuantTensor.from_hp takes a floating point weight, got torch.int8.",
    ),
    ("weight bits", dict(weight_bits=6), "weight_bits must be 3, 4 or 8, got 6."),
    (
        "act bits",
        dict(act_bits=9),
        "act_bits must be in 2..8, or 16 for activations that are not quantized, got "
        "9.",
    ),
    (
        "low-rank bits",
        dict(low_rank_bits=4),
        "low_rank_bits must be 8 or 16, got 4.",
    ),
    (
        "zero points where activations are quantized",
        dict(symmetric=False, weight_bits=4),
        "asymmetric weights are for activations that are not quantized (act_bits=16), "
        "got act_bits=8: quantize the weight symmetrically.",
    ),
    (
        # torchao's primitives take a block of one element for the whole tensor.
        "group size 1",
        dict(group_size=1),
        "group_size must be at least 2 and divide the input width, got group_size=1 "
        "for a weight of shape (6, 8).",
    ),
    (
        "one act bit",
        dict(act_bits=1),
        "act_bits must be in 2..8, or 16 for activations that are not quantized, got "
        "1.",
    ),
    (
        "group size",
        dict(group_size=3),
        "group_size must be at least 2 and divide the input width, got group_size=3 "
        "for a weight of shape (6, 8).",
    ),
    (
        "group size 0",
        dict(group_size=0),
        "group_size must be at least 2 and divide the input width, got group_size=0 "
        "for a weight of shape (6, 8).",
    ),
    (
        "no modality",
        dict(modalities=()),
        "modalities must be distinct names, base first, got ().",
    ),
    (
        "a modality twice",
        dict(modalities=("text", "text")),
        "modalities must be distinct names, base first, got ('text', 'text').",
    ),
    (
        "smoothing factor",
        dict(modalities=NAMES[:2], smoothing_factor=torch.ones(3, 8)),
        "smoothing_factor must have shape (2, 8) for modalities ('text', 'vision') and "
        "a weight of shape (6, 8), or (1, 8), got (3, 8).",
    ),
    (
        "l1",
        dict(
            modalities=NAMES[:2],
            smoothing_factor=torch.ones(2, 8),
            ranks=(2,),
            l1=torch.ones(2, 8),
            l2=torch.ones(2, 6),
        ),
        "l1 must have shape (8, 2) for a weight of shape (6, 8), modalities "
        "('text', 'vision') and ranks (2,), got (2, 8).",
    ),
    (
        "l2",
        dict(
            modalities=NAMES[:2],
            smoothing_factor=torch.ones(2, 8),
            ranks=(2,),
            l1=torch.ones(8, 2),
            l2=torch.ones(6, 2),
        ),
        "l2 must have shape (2, 6) for a weight of shape (6, 8), modalities "
        "('text', 'vision') and ranks (2,), got (6, 2).",
    ),
    (
        "modality bias",
        dict(
            modalities=NAMES[:3],
            smoothing_factor=torch.ones(3, 8),
            modality_bias=torch.ones(2, 6),
        ),
        "modality_bias must have shape (3, 6) for a weight of shape (6, 8), "
        "modalities ('text', 'vision', 'audio') and ranks (), got (2, 6).",
    ),
    (
        "shift",
        dict(
            modalities=NAMES[:2],
            smoothing_factor=torch.ones(2, 8),
            act_shift=torch.ones(1, 8),
        ),
        "act_shift must have shape (2, 8) for a weight of shape (6, 8), "
        "modalities ('text', 'vision') and ranks (), got (1, 8).",
    ),
    (
        "a shift of what is not quantized",
        dict(act_bits=16, act_shift=torch.ones(1, 8)),
        "a shift is for activations that are quantized: with act_bits=16 it changes "
        "nothing.",
    ),
    (
        "half a pair",
        dict(
            modalities=NAMES[:2],
            smoothing_factor=torch.ones(2, 8),
            ranks=(2,),
            l1=torch.ones(8, 2),
        ),
        "l1, l2 and ranks go together: give all three, or none of them.",
    ),
    (
        "ranks alone",
        dict(modalities=NAMES[:2], smoothing_factor=torch.ones(2, 8), ranks=(2,)),
        "l1, l2 and ranks go together: give all three, or none of them.",
    ),
    (
        "too few ranks",
        dict(
            modalities=NAMES[:3],
            smoothing_factor=torch.ones(3, 8),
            ranks=(2,),
            l1=torch.ones(8, 2),
            l2=torch.ones(2, 6),
        ),
        "ranks must hold one rank for each of ('vision', 'audio'), got (2,).",
    ),
    (
        "a negative rank",
        dict(
            modalities=NAMES[:3],
            smoothing_factor=torch.ones(3, 8),
            ranks=(-1, 3),
            l1=torch.ones(8, 2),
            l2=torch.ones(2, 6),
        ),
        "ranks must hold one rank for each of ('vision', 'audio'), got (-1, 3).",
    ),
    (
        "a pair that no token would meet",
        dict(
            modalities=NAMES[:2],
            smoothing_factor=torch.ones(1, 8),
            ranks=(2,),
            l1=torch.ones(8, 2),
            l2=torch.ones(2, 6),
        ),
        "a low-rank pair, a modality bias and a shift need one smoothing factor for "
        "each of ('text', 'vision'): with one for all, tokens are not told apart.",
    ),
    (
        "a modality bias that no token would meet",
        dict(modalities=NAMES[:2], modality_bias=torch.ones(2, 6)),
        "a low-rank pair, a modality bias and a shift need one smoothing factor for "
        "each of ('text', 'vision'): with one for all, tokens are not told apart.",
    ),
    (
        "a shift that no token would meet",
        dict(modalities=NAMES[:2], act_shift=torch.ones(2, 8)),
        "a low-rank pair, a modality bias and a shift need one smoothing factor for "
        "each of ('text', 'vision'): with one for all, tokens are not told apart.",
    ),
]


@pytest.mark.parametrize(
    "kwargs, message",
    [pytest.param(kwargs, text, id=name) for name, kwargs, text in REFUSED],
)
def test_from_hp_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        MASQuantTensor.from_hp(**{"hp_tensor": WEIGHT, **kwargs})
    assert str(raised.value) == message


def test_dequantize_of_an_unknown_modality() -> None:
    message = "this MASQuantTensor knows the modalities ('text', 'vision', 'audio'), "
    with pytest.raises(ValueError, match=re.escape(message + "not 'smell'.")):
        make().tensor.dequantize(modality="smell")


def test_smoothed_weight_round_trip() -> None:
    """The two public functions, without a tensor around them."""
    weight, pre_scale = torch.randn(4, 12), torch.rand(12) + 0.5
    q, scale, zero_point = quantize_smoothed_weight(weight, pre_scale, 4, 3)
    assert zero_point is None
    assert q.shape == (4, 12) and q.dtype == torch.int8 and scale.shape == (4, 4)
    assert q.min() >= -8 and q.max() <= 7
    back = dequantize_smoothed_weight(q, scale, torch.float16)
    assert back.dtype == torch.float16
    expected = q.numpy() * np.repeat(f64(scale), 3, axis=1)
    np.testing.assert_allclose(f64(back), expected, rtol=2.0**-11 + 2 * UNIT)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group_size", [None, 3])
def test_asymmetric_round_trip(group_size: Optional[int], bits: int) -> None:
    """Weights of one sign use all integers, which symmetric ones cannot."""
    generator = torch.Generator().manual_seed(0)
    pre_scale = torch.rand(12, generator=generator) + 0.5
    for sign in (1, -1):
        weight = sign * (torch.rand(40, 12, generator=generator) + 0.1)
        q, scale, zero_point = quantize_smoothed_weight(
            weight, pre_scale, bits, group_size, symmetric=False
        )
        assert zero_point is not None and zero_point.dtype == torch.int8
        assert zero_point.shape == scale.shape == (40, 4 if group_size else 1)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert (zero_point == (least if sign > 0 else most)).all()
        assert q.min() >= least and q.max() <= most
        width = 12 // scale.shape[1]
        expected = q.numpy() - np.repeat(zero_point.numpy(), width, 1).astype(float)
        expected *= np.repeat(f64(scale), width, 1)
        for dtype in DTYPES:
            back = dequantize_smoothed_weight(q, scale, dtype, zero_point)
            assert back.dtype == dtype
            np.testing.assert_allclose(f64(back), expected, rtol=OUT[dtype][0] + UNIT)
        step = np.repeat(f64(scale), width, 1)
        smoothed = f64(weight) / f64(pre_scale)
        assert (np.abs(expected - smoothed) <= 0.5 * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_group", [True, False])
def test_clip(symmetric: bool, per_group: bool) -> None:
    """The factor is the scale's, and weights beyond the range take its ends."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator)
    clip = torch.rand(6, 3 if per_group else 1, generator=generator) * 0.8 + 0.2
    args = (weight, torch.ones(24), 4, 8)
    whole = quantize_smoothed_weight(*args, symmetric=symmetric)
    q, scale, zero_point = quantize_smoothed_weight(
        *args, symmetric=symmetric, clip=clip
    )
    # A product with each end of the range, and as many divisions and sums as before.
    np.testing.assert_allclose(
        f64(scale), f64(whole[1]) * f64(clip), rtol=6 * UNIT, atol=0
    )
    shift = np.zeros((6, 24))
    if zero_point is not None:
        # A range that shrinks towards zero keeps zero where it is.
        assert whole[2] is not None and (zero_point - whole[2]).abs().max() <= 1
        shift = np.repeat(zero_point.numpy(), 8, 1).astype(float)
    levels = f64(weight) / np.repeat(f64(scale), 8, 1) + shift
    assert (np.abs(q.numpy() - np.clip(levels, -8, 7)) <= 0.5 + 1e-5).all()
    # Something was clipped.
    assert levels.max() > 8.5
    for a, b in zip(
        quantize_smoothed_weight(*args, symmetric=symmetric, clip=torch.ones(6, 1)),
        whole,
    ):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, float("nan")])
def test_clip_out_of_range(value: float) -> None:
    clip = torch.full((6, 1), 0.5)
    clip[3] = value
    with pytest.raises(ValueError, match=re.escape("must lie in (0, 1].")):
        quantize_smoothed_weight(WEIGHT, torch.ones(8), 4, clip=clip)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 3), (2, 2)], ids=str)
def test_clip_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    message = (
        "clip must have shape (6, 2) or (6, 1) for a weight of shape (6, 8) with "
        f"group_size=4, got {shape}."
    )
    with pytest.raises(ValueError) as raised:
        quantize_smoothed_weight(
            WEIGHT, torch.ones(8), 4, 4, clip=torch.full(shape, 0.5)
        )
    assert str(raised.value) == message


class TestRepr(expecttest.TestCase):
    def test_routed(self) -> None:
        self.assertExpectedInline(
            repr(make("w4a6").tensor),
            """MASQuantTensor(shape=(6, 16), w4a6, modalities=('text', 'vision', 'audio'), ranks={'vision': 2, 'audio': 3}, modality_bias, act_shift, 748 bytes, dtype=torch.float32, device=cpu)""",
        )

    def test_groups_and_one_smoothing_factor(self) -> None:
        tensor = unrouted("w4a8", group_size=8, dtype=torch.bfloat16)
        self.assertExpectedInline(
            repr(tensor),
            """MASQuantTensor(shape=(6, 16), w4a8, one smoothing factor for all modalities, group_size=8, 160 bytes, dtype=torch.bfloat16, device=cpu)""",
        )

    def test_asymmetric_and_a_pair_of_8_bits(self) -> None:
        self.assertExpectedInline(
            repr(make("w4a16", group_size=8, low_rank_bits=8).tensor),
            """MASQuantTensor(shape=(6, 16), w4a16, modalities=('text', 'vision', 'audio'), group_size=8, asymmetric, ranks={'vision': 2, 'audio': 3}, low_rank_bits=8, modality_bias, 502 bytes, dtype=torch.float32, device=cpu)""",
        )

    def test_without_pair_and_modality_bias(self) -> None:
        tensor = make(ranks=(), with_bias=False).tensor
        self.assertExpectedInline(
            repr(tensor),
            """MASQuantTensor(shape=(6, 16), w8a8, modalities=('text', 'vision', 'audio'), 312 bytes, dtype=torch.float32, device=cpu)""",
        )
