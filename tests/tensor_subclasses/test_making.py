# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Making a MASQuantTensor of a weight or of integers, and reading it back."""

import re
from typing import Any, Optional

import expecttest
import numpy as np
import pytest
import torch
from operator_oracle import OUT, UNIT, f64, ids_for, unpacked
from tensor_oracle import (
    NAMES,
    SCHEMES,
    assert_dequantized,
    assert_linear,
    assert_same,
    make,
    smoothed_f64,
    unrouted,
)

from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    dequantize_smoothed_weight,
    low_rank_dtype,
    quantize_low_rank_pair,
    quantize_smoothed_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Of a weight: its shape, its type, its groups, its pairs.
WEIGHTS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "smallest": dict(shape=(1, 2), ranks=(1, 0)),
    "odd-width": dict(shape=(5, 33)),
    "large": dict(shape=(32, 128), dtype=torch.bfloat16),
    "bfloat16": dict(dtype=torch.bfloat16, group_size=8),
    "float16": dict(dtype=torch.float16, low_rank_bits=8),
    "groups-of-2": dict(shape=(5, 24), group_size=2, ranks=(0, 4)),
    "groups-of-3": dict(shape=(5, 24), group_size=3, ranks=()),
    "groups-of-12": dict(shape=(5, 24), group_size=12, low_rank_bits=8),
    "one-group": dict(shape=(5, 24), group_size=24),
    "rotation": dict(shape=(5, 24), hadamard_size=8),
    "rotation-groups": dict(shape=(7, 32), hadamard_size=32, group_size=4),
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS)


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
    q = unpacked(tensor.qdata, bits, tensor.in_features)
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


@every_weight
def test_integers_scales_and_what_they_stand_for(weight: str) -> None:
    for scheme in SCHEMES:
        assert_made(scheme, WEIGHTS[weight])


def assert_made(scheme: str, options: dict[str, Any]) -> None:
    made = make(scheme, **options)
    t, shape = made.tensor, options.get("shape", (6, 16))
    assert t.shape == shape and t.dtype == options.get("dtype", torch.float32)
    assert (t.weight_bits, t.act_bits) == SCHEMES[scheme]
    assert t.group_size == options.get("group_size", shape[1])
    assert t.scale.shape == (shape[0], shape[1] // t.group_size)
    assert t.scale.dtype == t.act_pre_scale.dtype == torch.float32
    if "hadamard_size" not in options:
        assert_quantized(t, made.weight, made.smoothing_factor)
    # Two reciprocals.
    factor = f64(made.smoothing_factor)
    np.testing.assert_allclose(f64(t.act_pre_scale), 1 / factor, rtol=UNIT)
    np.testing.assert_allclose(f64(t.smoothing_factor), factor, rtol=2.01 * UNIT)
    stored = unpacked(t.qdata, t.weight_bits, t.in_features)
    np.testing.assert_array_equal(t.int_data().numpy(), stored)
    for dtype in (None, torch.float32, torch.bfloat16):
        assert_dequantized(t, dtype)
    assert torch.equal(t.dequantize(), t.dequantize(modality="text"))


@every_weight
def test_from_hp_is_quantize_and_from_integers(weight: str) -> None:
    for scheme in SCHEMES:
        assert_same_of_integers(scheme, WEIGHTS[weight])


def assert_same_of_integers(scheme: str, options: dict[str, Any]) -> None:
    made = make(scheme, **options)
    weight_bits, act_bits = SCHEMES[scheme]
    qdata, scale, zero_point = quantize_smoothed_weight(
        made.weight,
        made.tensor.act_pre_scale[0],
        weight_bits,
        options.get("group_size"),
        symmetric=act_bits != 16,
        hadamard_size=options.get("hadamard_size"),
    )
    ready = MASQuantTensor.from_integers(
        qdata,
        scale,
        zero_point=zero_point,
        weight_bits=weight_bits,
        act_bits=act_bits,
        modalities=NAMES[:3],
        smoothing_factor=made.smoothing_factor,
        dtype=made.weight.dtype,
        ranks=made.ranks,
        l1=made.l1,
        l2=made.l2,
        modality_bias=made.modality_bias,
        act_shift=made.act_shift,
        low_rank_bits=options.get("low_rank_bits", 16),
        hadamard_size=options.get("hadamard_size"),
    )
    assert_same(ready, made.tensor)


@pytest.mark.parametrize("shape", [(1, 2), (5, 15)], ids=str)
@pytest.mark.parametrize(
    "weight_bits, act_bits, asymmetric",
    [(8, 8, False), (4, 8, False), (3, 3, False), (4, 16, True), (8, 16, True)],
)
def test_any_integers(
    weight_bits: int, act_bits: int, asymmetric: bool, shape: tuple[int, int]
) -> None:
    """They are kept as they are, to the ends of their range."""
    rng = np.random.default_rng(0)
    least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1)
    q = rng.integers(least, most, shape).astype(np.int8)
    q.flat[:2] = least, most - 1
    z = rng.integers(least, most, (shape[0], 1)).astype(np.int64)
    scale = torch.rand(shape[0], 1, dtype=torch.float64) + 0.1
    tensor = MASQuantTensor.from_integers(
        torch.from_numpy(q),
        scale,
        zero_point=torch.from_numpy(z) if asymmetric else None,
        weight_bits=weight_bits,
        act_bits=act_bits,
        modalities=NAMES[:2],
        smoothing_factor=torch.rand(2, shape[1]) + 0.5,
        dtype=torch.bfloat16,
    )
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(tensor.int_data().numpy(), q)
    assert torch.equal(tensor.scale, scale.float())
    stands_for = (q.astype(int) - z * asymmetric) * f64(scale.float())
    np.testing.assert_allclose(smoothed_f64(tensor), stands_for)
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(0))
    ids = ids_for(7, modalities=2)
    assert_linear(torch.ops.masquant.linear(x, tensor, ids), tensor, x, ids)


def test_on_meta() -> None:
    """Shapes are checked, values there are none."""
    parts = {**INTEGERS, "modalities": NAMES[:1], "smoothing_factor": torch.ones(1, 8)}
    qdata, scale = (parts.pop(name).to("meta") for name in ("qdata", "scale"))
    tensor = MASQuantTensor.from_integers(qdata, scale, **parts)
    assert tensor.is_meta and tensor.qdata.shape == (6, 4)
    assert tensor.act_pre_scale.is_meta
    with pytest.raises(ValueError, match="scale must have shape"):
        MASQuantTensor.from_integers(qdata, scale[:5], **parts)


def test_a_non_contiguous_weight() -> None:
    for group_size in (None, 4):
        made = make(shape=(8, 8), ranks=(), group_size=group_size)
        weight = made.weight.t().contiguous().t()
        assert not weight.is_contiguous()
        tensor = MASQuantTensor.from_hp(
            weight,
            modalities=NAMES[:3],
            smoothing_factor=made.smoothing_factor,
            group_size=group_size,
        )
        assert torch.equal(tensor.qdata, made.tensor.qdata)
        assert torch.equal(tensor.scale, made.tensor.scale)


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


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_a_rotated_weight_is_near_the_original(scheme: str) -> None:
    """Half a step of each value in a block at most."""
    made = make(scheme, shape=(16, 64), hadamard_size=16)
    step = f64(made.tensor.scale) * f64(made.tensor.act_pre_scale)[0]
    error = np.abs(f64(made.tensor.dequantize()) - f64(made.weight))
    assert (error <= 0.5 * np.sqrt(16) * step * 1.001).all()


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


def test_pairs_have_16_bits_and_biases_32() -> None:
    for dtype in (*DTYPES, torch.float64):
        held = torch.float16 if dtype == torch.float16 else torch.bfloat16
        assert low_rank_dtype(dtype) == held
        made = make(dtype=dtype)
        assert made.l1 is not None and made.l2 is not None
        assert torch.equal(made.tensor.l1, made.l1.to(held))
        assert torch.equal(made.tensor.l2, made.l2.to(held))
        assert made.tensor.modality_bias.dtype == torch.float32
        assert torch.equal(made.tensor.modality_bias, made.modality_bias)


def pair(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of components whose sizes differ by orders of magnitude, as an SVD's do."""
    k, r, n = shape
    generator = torch.Generator().manual_seed(sum(shape))
    size = 10.0 ** -torch.arange(r).float().remainder(6)
    l1 = torch.randn(k, r, generator=generator) * size
    return l1, torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("shape", [(2, 1, 1), (16, 5, 6), (31, 4, 1), (64, 24, 40)])
def test_pairs_of_8_bits(shape: tuple[int, int, int]) -> None:
    """A scale for both sides of each component, and the ends of the range in use."""
    l1, l2 = pair(shape)
    q1, q2, scale = quantize_low_rank_pair(l1, l2)
    assert q1.dtype == q2.dtype == torch.int8 and scale.dtype == torch.float32
    assert q1.shape == l1.shape and q2.shape == l2.shape and scale.shape == shape[1:2]
    assert q1.is_contiguous() and q2.is_contiguous()
    down = np.abs(f64(l1)).max(0, keepdims=True) / 127
    up = np.abs(f64(l2)).max(1, keepdims=True) / 127
    # Two divisions and their product.
    np.testing.assert_allclose(f64(scale), (down.T * up)[:, 0], rtol=3.01 * UNIT)
    for q, values, step in ((q1, l1, down), (q2, l2, up)):
        # The scale's division, its reciprocal and the product with it.
        most = 0.5 + 3.01 * UNIT * 127
        assert (np.abs(q.numpy() - f64(values) / step) <= most).all()
        assert q.min() >= -127
    assert (q1.abs().amax(0) == 127).all() and (q2.abs().amax(1) == 127).all()
    # Half a step of each side, times the other side's size.
    down, up = down / 2 * np.ones(l1.shape), up / 2 * np.ones(l2.shape)
    bound = down @ np.abs(f64(l2)) + np.abs(f64(l1)) @ up + down @ up
    error = np.abs((f64(q1) * f64(scale)) @ f64(q2) - f64(l1) @ f64(l2))
    assert (error <= bound * (1 + 1e-4)).all()
    # Quantized again it stays.
    again = quantize_low_rank_pair(q1 * scale, q2.float())
    assert torch.equal(again[0], q1) and torch.equal(again[1], q2)
    torch.testing.assert_close(again[2], scale, rtol=4 * UNIT, atol=0)


def test_pairs_of_8_bits_of_any_type_and_of_zeros() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        l1, l2 = (t.to(dtype) for t in pair((16, 5, 6)))
        same = quantize_low_rank_pair(l1.float(), l2.float())
        for a, b in zip(quantize_low_rank_pair(l1, l2), same):
            assert torch.equal(a, b)
    # A singular value of zero: no scale of its own, no nan, and a product of zero.
    l1, l2 = pair((16, 5, 6))
    clean = quantize_low_rank_pair(l1, l2)
    l1[:, 1], l2[3] = 0, 0
    q1, q2, scale = quantize_low_rank_pair(l1, l2)
    assert torch.isfinite(scale).all()
    rest = [0, 2, 4]
    expected = clean[0][:, rest].double() * clean[2][rest].double()
    product = q1.double() * scale.double() @ q2.double()
    assert torch.equal(product, expected @ clean[1][rest].double())


def test_a_pair_of_8_bits_in_a_tensor() -> None:
    """It holds what the function gives, and says so."""
    made = make(low_rank_bits=8)
    assert made.l1 is not None and made.l2 is not None
    q1, q2, scale = quantize_low_rank_pair(made.l1, made.l2)
    assert torch.equal(made.tensor.l1, q1) and torch.equal(made.tensor.l2, q2)
    assert torch.equal(made.tensor.low_rank_scale, scale)
    assert made.tensor.low_rank_bits == 8
    # Nothing to quantize: 16 bits are what a pair would have.
    bare = make(low_rank_bits=8, ranks=()).tensor
    assert bare.low_rank_bits == 16 and bare.low_rank_scale is None
    assert made.tensor.is_routed and not unrouted().is_routed


@pytest.mark.parametrize(
    "tensor, bytes_stored",
    [
        # integers + scales + pre-scales and shifts + pair in 16 bits + modality bias
        (make("w8a8").tensor, 96 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        (make("w4a8").tensor, 48 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        (make("w4a8", shape=(6, 15)).tensor, 48 + 24 + 2 * 180 + 2 * 5 * 21 + 72),
        (make("w4a8", group_size=4).tensor, 48 + 96 + 2 * 192 + 2 * 5 * 22 + 72),
        (make("w3a3").tensor, 48 + 24 + 2 * 192 + 2 * 5 * 22 + 72),
        # and zero points, but no shifts
        (make("w4a16", group_size=4).tensor, 48 + 96 + 192 + 2 * 5 * 22 + 72 + 24),
        # a pair of half as many, and a scale per component
        (make(low_rank_bits=8).tensor, 96 + 24 + 2 * 192 + 5 * 22 + 20 + 72),
        (unrouted("w4a8"), 48 + 24 + 64),
    ],
    ids=lambda value: repr(value)[15:60] if isinstance(value, torch.Tensor) else "",
)
def test_nbytes(tensor: MASQuantTensor, bytes_stored: int) -> None:
    assert tensor.nbytes_stored == tensor.nbytes == bytes_stored
    # As transformers adds a model's memory up.
    assert tensor.nelement() * tensor.element_size() == bytes_stored
    assert type(tensor.nelement() * tensor.element_size()) is int
    assert tensor.numel() == tensor.shape[0] * tensor.shape[1]


WEIGHT = torch.ones(6, 8)
INTEGERS: dict[str, Any] = dict(
    qdata=torch.ones(6, 8, dtype=torch.int8),
    scale=torch.ones(6, 2),
    weight_bits=4,
    act_bits=16,
    modalities=NAMES[:2],
    smoothing_factor=torch.ones(2, 8),
    dtype=torch.float32,
)
QDATA, SCALE = INTEGERS["qdata"], INTEGERS["scale"]
TWO: dict[str, Any] = dict(modalities=NAMES[:2], smoothing_factor=torch.ones(2, 8))
THREE: dict[str, Any] = dict(modalities=NAMES[:3], smoothing_factor=torch.ones(3, 8))
PAIR: dict[str, Any] = dict(ranks=(2,), l1=torch.ones(8, 2), l2=torch.ones(2, 6))
ASYMMETRIC = (
    "asymmetric weights are for activations that are not quantized (act_bits=16), got "
    "act_bits=8: quantize the weight symmetrically."
)
TOGETHER = "l1, l2 and ranks go together: give all three, or none of them."
ALIKE = (
    "a low-rank pair, a modality bias and a shift need one smoothing factor for each of "
    "('text', 'vision'): with one for all, tokens are not told apart."
)
ONE_RANK = "ranks must hold one rank for each of ('vision', 'audio'), got {}."
ACT_BITS = (
    "act_bits must be in 2..8, or 16 for activations that are not quantized, got {}."
)
GROUP_SIZE = (
    "group_size must be at least 2 and divide the input width, got group_size={} for a "
    "weight of shape (6, 8)."
)
FACTOR = (
    "smoothing_factor must have shape (2, 8) for modalities ('text', 'vision') and a "
    "weight of shape (6, 8), or (1, 8), got {}."
)
SHAPE = (
    "{} must have shape {} for a weight of shape (6, 8), modalities ('text', 'vision') "
    "and ranks {}, got {}."
)
SCALES = (
    "scale must have shape (6, G), with a number of groups G that divides 8, for "
    "integers of shape (6, 8), got {}."
)
POSITIVE = "scale must be positive and finite."

OF_A_WEIGHT: list[tuple[dict[str, Any], str]] = [
    (
        dict(hp_tensor=torch.ones(2, 6, 8)),
        "MASQuantTensor.from_hp takes a 2-D weight (N, K), got shape (2, 6, 8).",
    ),
    (
        dict(hp_tensor=torch.ones(6, 8, dtype=torch.int8)),
        "MASQuantTensor.from_hp takes a floating point weight, got torch.int8.",
    ),
    (dict(weight_bits=6), "weight_bits must be 3, 4 or 8, got 6."),
    (dict(act_bits=9), ACT_BITS.format(9)),
    (dict(act_bits=1), ACT_BITS.format(1)),
    (dict(low_rank_bits=4), "low_rank_bits must be 8 or 16, got 4."),
    (dict(symmetric=False, weight_bits=4), ASYMMETRIC),
    # torchao's primitives take a block of one element for the whole tensor.
    (dict(group_size=1), GROUP_SIZE.format(1)),
    (dict(group_size=3), GROUP_SIZE.format(3)),
    (dict(group_size=0), GROUP_SIZE.format(0)),
    (dict(modalities=()), "modalities must be distinct names, base first, got ()."),
    (
        dict(modalities=("text", "text")),
        "modalities must be distinct names, base first, got ('text', 'text').",
    ),
    ({**TWO, "smoothing_factor": torch.ones(3, 8)}, FACTOR.format((3, 8))),
    (
        {**TWO, **PAIR, "l1": torch.ones(2, 8)},
        SHAPE.format("l1", (8, 2), (2,), (2, 8)),
    ),
    (
        {**TWO, **PAIR, "l2": torch.ones(6, 2)},
        SHAPE.format("l2", (2, 6), (2,), (6, 2)),
    ),
    (
        {**TWO, "modality_bias": torch.ones(3, 6)},
        SHAPE.format("modality_bias", (2, 6), (), (3, 6)),
    ),
    (
        {**TWO, "act_shift": torch.ones(1, 8)},
        SHAPE.format("act_shift", (2, 8), (), (1, 8)),
    ),
    (
        dict(act_bits=16, act_shift=torch.ones(1, 8)),
        "a shift is for activations that are quantized: with act_bits=16 it changes "
        "nothing.",
    ),
    ({**TWO, **PAIR, "l2": None}, TOGETHER),
    ({**TWO, "ranks": (2,)}, TOGETHER),
    ({**THREE, **PAIR}, ONE_RANK.format((2,))),
    ({**THREE, **PAIR, "ranks": (-1, 3)}, ONE_RANK.format((-1, 3))),
    # Parts that no token would meet.
    ({**TWO, **PAIR, "smoothing_factor": torch.ones(1, 8)}, ALIKE),
    (dict(modalities=NAMES[:2], modality_bias=torch.ones(2, 6)), ALIKE),
    (dict(modalities=NAMES[:2], act_shift=torch.ones(2, 8)), ALIKE),
]
OF_INTEGERS: list[tuple[dict[str, Any], str]] = [
    (
        dict(qdata=QDATA[None]),
        "MASQuantTensor.from_integers takes 2-D integers (N, K), got shape (1, 6, 8).",
    ),
    (
        dict(qdata=QDATA.to(torch.uint8)),
        "MASQuantTensor.from_integers takes unpacked integers of type int8, got "
        "torch.uint8.",
    ),
    (dict(qdata=QDATA * 8), "qdata of 4 bits must lie in -8..7, got 8..8."),
    (
        dict(weight_bits=3, qdata=QDATA * -5),
        "qdata of 3 bits must lie in -4..3, got -5..-5.",
    ),
    (dict(weight_bits=2), "weight_bits must be 3, 4 or 8, got 2."),
    (dict(scale=SCALE[:5]), SCALES.format((5, 2))),
    (dict(scale=SCALE[:, 0]), SCALES.format((6,))),
    (dict(scale=torch.ones(6, 3)), SCALES.format((6, 3))),
    (dict(scale=torch.ones(6, 0)), SCALES.format((6, 0))),
    (
        dict(scale=torch.ones(6, 8)),
        "scale of shape (6, 8) leaves one integer to a group for integers of shape "
        "(6, 8): groups hold at least 2.",
    ),
    (dict(scale=SCALE.int()), "scale must be floating point, got torch.int32."),
    (dict(scale=SCALE * 0), POSITIVE),
    (dict(scale=SCALE * np.nan), POSITIVE),
    (dict(scale=SCALE * np.inf), POSITIVE),
    (
        dict(zero_point=torch.zeros(6, 1, dtype=torch.int8)),
        "zero_point must have scale's shape (6, 2), got (6, 1).",
    ),
    (
        dict(zero_point=torch.zeros(6, 2)),
        "zero_point must be integers, got torch.float32.",
    ),
    # As of uint4, not shifted.
    (
        dict(zero_point=torch.full((6, 2), 8)),
        "zero_point of 4 bits must lie in -8..7, got 8..8.",
    ),
    (dict(zero_point=torch.zeros(6, 2, dtype=torch.int8), act_bits=8), ASYMMETRIC),
    (dict(smoothing_factor=torch.ones(2, 7)), FACTOR.format((2, 7))),
    (dict(ranks=(2,), l1=torch.ones(8, 2)), TOGETHER),
]


def test_what_is_refused() -> None:
    """In one sentence that names what is wrong, whichever way a tensor is made."""
    MASQuantTensor.from_hp(WEIGHT)
    MASQuantTensor.from_integers(**INTEGERS)
    for make_it, whole, refused in (
        (MASQuantTensor.from_hp, {"hp_tensor": WEIGHT}, OF_A_WEIGHT),
        (MASQuantTensor.from_integers, INTEGERS, OF_INTEGERS),
    ):
        for kwargs, message in refused:
            with pytest.raises((ValueError, TypeError)) as raised:
                make_it(**{**whole, **kwargs})
            assert str(raised.value) == message
    for scheme in SCHEMES:
        with pytest.raises(
            ValueError, match=r"shape \(4, 1\) has too few input channels"
        ):
            make(scheme, shape=(4, 1))
    for size in (3, 32, 1):
        with pytest.raises(ValueError, match=f"hadamard_size={size} .* width of 48"):
            make(shape=(4, 48), hadamard_size=size)
    message = "this MASQuantTensor knows the modalities ('text', 'vision', 'audio'), "
    with pytest.raises(ValueError, match=re.escape(message + "not 'smell'.")):
        make().tensor.dequantize(modality="smell")


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group_size", [None, 3])
def test_the_two_functions_without_a_tensor(
    group_size: Optional[int], bits: int
) -> None:
    """Weights of one sign use all integers, which symmetric ones cannot."""
    generator = torch.Generator().manual_seed(0)
    pre_scale = torch.rand(12, generator=generator) + 0.5
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for sign in (1, -1):
        weight = sign * (torch.rand(40, 12, generator=generator) + 0.1)
        for symmetric in (True, False):
            q, scale, zero_point = quantize_smoothed_weight(
                weight, pre_scale, bits, group_size, symmetric=symmetric
            )
            assert q.dtype == torch.int8 and q.min() >= least and q.max() <= most
            assert scale.shape == (40, 4 if group_size else 1)
            width = 12 // scale.shape[1]
            levels = q.numpy().astype(float)
            if symmetric:
                assert zero_point is None
            else:
                assert zero_point.dtype == torch.int8
                assert zero_point.shape == scale.shape
                assert (zero_point == (least if sign > 0 else most)).all()
                levels -= np.repeat(zero_point.numpy(), width, 1)
            step = np.repeat(f64(scale), width, 1)
            for dtype in DTYPES:
                back = dequantize_smoothed_weight(q, scale, dtype, zero_point)
                assert back.dtype == dtype
                np.testing.assert_allclose(
                    f64(back), levels * step, rtol=OUT[dtype][0] + UNIT
                )
            smoothed = f64(weight) / f64(pre_scale)
            assert (np.abs(levels * step - smoothed) <= 0.5 * step * (1 + 1e-4)).all()


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


def test_clips_that_are_refused() -> None:
    ones = torch.ones(8)
    for value in (0.0, -0.5, 1.01, float("nan")):
        clip = torch.full((6, 1), 0.5)
        clip[3] = value
        with pytest.raises(ValueError, match=re.escape("must lie in (0, 1].")):
            quantize_smoothed_weight(WEIGHT, ones, 4, clip=clip)
    for shape in ((6,), (1, 6), (6, 3), (2, 2)):
        with pytest.raises(ValueError) as raised:
            quantize_smoothed_weight(WEIGHT, ones, 4, 4, clip=torch.full(shape, 0.5))
        assert str(raised.value) == (
            "clip must have shape (6, 2) or (6, 1) for a weight of shape (6, 8) with "
            f"group_size=4, got {shape}."
        )


class TestRepr(expecttest.TestCase):
    def test_routed(self) -> None:
        self.assertExpectedInline(
            repr(make("w4a6").tensor),
            """MASQuantTensor(shape=(6, 16), w4a6, modalities=('text', 'vision', 'audio'), ranks={'vision': 2, 'audio': 3}, modality_bias, act_shift, 748 bytes, dtype=torch.float32, device=cpu)""",
        )

    def test_groups_rotation_and_one_smoothing_factor(self) -> None:
        tensor = unrouted("w4a8", group_size=8, dtype=torch.bfloat16, hadamard_size=4)
        self.assertExpectedInline(
            repr(tensor),
            """MASQuantTensor(shape=(6, 16), w4a8, one smoothing factor for all modalities, group_size=8, hadamard_size=4, 160 bytes, dtype=torch.bfloat16, device=cpu)""",
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
