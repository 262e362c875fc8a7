# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A MASQuantTensor of integers that are ready."""

from typing import Any, Optional

import numpy as np
import pytest
import torch
from tensor_oracle import (
    NAMES,
    SCHEMES,
    assert_linear,
    assert_same,
    f64,
    ids_for,
    integers,
    make,
    smoothed_f64,
)

from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    quantize_smoothed_weight,
)

linear = torch.ops.masquant.linear


@pytest.mark.parametrize("low_rank_bits", [16, 8])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_hp_is_quantize_and_from_integers(
    scheme: str, dtype: torch.dtype, group_size: Optional[int], low_rank_bits: int
) -> None:
    case = make(scheme, dtype=dtype, group_size=group_size, low_rank_bits=low_rank_bits)
    weight_bits, act_bits = SCHEMES[scheme]
    qdata, scale, zero_point = quantize_smoothed_weight(
        case.weight,
        case.tensor.act_pre_scale[0],
        weight_bits,
        group_size,
        symmetric=act_bits != 16,
    )
    ready = MASQuantTensor.from_integers(
        qdata,
        scale,
        zero_point=zero_point,
        weight_bits=weight_bits,
        act_bits=act_bits,
        modalities=NAMES[:3],
        smoothing_factor=case.smoothing_factor,
        dtype=dtype,
        ranks=case.ranks,
        l1=case.l1,
        l2=case.l2,
        modality_bias=case.modality_bias,
        act_shift=case.act_shift,
        low_rank_bits=low_rank_bits,
    )
    assert_same(ready, case.tensor)


@pytest.mark.parametrize("shape", [(1, 2), (5, 15), (6, 16)], ids=str)
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
    factors = torch.rand(2, shape[1]) + 0.5
    tensor = MASQuantTensor.from_integers(
        torch.from_numpy(q),
        scale,
        zero_point=torch.from_numpy(z) if asymmetric else None,
        weight_bits=weight_bits,
        act_bits=act_bits,
        modalities=NAMES[:2],
        smoothing_factor=factors,
        dtype=torch.bfloat16,
    )
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(integers(tensor), q)
    np.testing.assert_array_equal(tensor.int_data().numpy(), q)
    assert torch.equal(tensor.scale, scale.float())
    stands_for = (q.astype(int) - z * asymmetric) * f64(scale.float())
    np.testing.assert_allclose(smoothed_f64(tensor), stands_for)
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(0))
    ids = ids_for(7, modalities=2)
    assert_linear(linear(x, tensor, ids, None), tensor, x, ids)


def test_on_meta() -> None:
    """Shapes are checked, values there are none."""
    parts: dict[str, Any] = dict(
        weight_bits=4,
        act_bits=16,
        modalities=NAMES[:1],
        smoothing_factor=torch.ones(1, 8),
        dtype=torch.float32,
    )
    qdata = torch.empty(6, 8, dtype=torch.int8, device="meta")
    scale = torch.empty(6, 2, device="meta")
    tensor = MASQuantTensor.from_integers(qdata, scale, **parts)
    assert tensor.is_meta and tensor.qdata.shape == (6, 4)
    assert tensor.act_pre_scale.is_meta
    with pytest.raises(ValueError, match="scale must have shape"):
        MASQuantTensor.from_integers(qdata, scale[:5], **parts)


QDATA = torch.ones(6, 8, dtype=torch.int8)
SCALE = torch.ones(6, 2)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "3-D integers",
        dict(qdata=QDATA[None]),
        "MASQuantTensor.from_integers takes 2-D integers (N, K), got shape (1, 6, 8).",
    ),
    (
        "packed integers",
        dict(qdata=QDATA.to(torch.uint8)),
        "MASQuantTensor.from_integers takes unpacked integers of type int8, got "
        "torch.uint8.",
    ),
    (
        "integers of 5 bits",
        dict(qdata=QDATA * 8),
        "qdata of 4 bits must lie in -8..7, got 8..8.",
    ),
    (
        "integers of 4 bits for 3",
        dict(weight_bits=3, qdata=QDATA * -5),
        "qdata of 3 bits must lie in -4..3, got -5..-5.",
    ),
    ("weight bits", dict(weight_bits=2), "weight_bits must be 3, 4 or 8, got 2."),
    (
        "scale of other rows",
        dict(scale=SCALE[:5]),
        "scale must have shape (6, G), with a number of groups G that divides 8, for "
        "integers of shape (6, 8), got (5, 2).",
    ),
    (
        "flat scale",
        dict(scale=SCALE[:, 0]),
        "scale must have shape (6, G), with a number of groups G that divides 8, for "
        "integers of shape (6, 8), got (6,).",
    ),
    (
        "3 groups of 8",
        dict(scale=torch.ones(6, 3)),
        "scale must have shape (6, G), with a number of groups G that divides 8, for "
        "integers of shape (6, 8), got (6, 3).",
    ),
    (
        "no group",
        dict(scale=torch.ones(6, 0)),
        "scale must have shape (6, G), with a number of groups G that divides 8, for "
        "integers of shape (6, 8), got (6, 0).",
    ),
    (
        "groups of one",
        dict(scale=torch.ones(6, 8)),
        "scale of shape (6, 8) leaves one integer to a group for integers of shape "
        "(6, 8): groups hold at least 2.",
    ),
    (
        "integer scale",
        dict(scale=SCALE.int()),
        "scale must be floating point, got torch.int32.",
    ),
    ("scale 0", dict(scale=SCALE * 0), "scale must be positive and finite."),
    ("scale nan", dict(scale=SCALE * np.nan), "scale must be positive and finite."),
    ("scale inf", dict(scale=SCALE * np.inf), "scale must be positive and finite."),
    (
        "zero point of another shape",
        dict(zero_point=torch.zeros(6, 1, dtype=torch.int8)),
        "zero_point must have scale's shape (6, 2), got (6, 1).",
    ),
    (
        "zero point of floats",
        dict(zero_point=torch.zeros(6, 2)),
        "zero_point must be integers, got torch.float32.",
    ),
    (
        # As of uint4, not shifted.
        "zero point out of range",
        dict(zero_point=torch.full((6, 2), 8)),
        "zero_point of 4 bits must lie in -8..7, got 8..8.",
    ),
    (
        "zero points where activations are quantized",
        dict(zero_point=torch.zeros(6, 2, dtype=torch.int8), act_bits=8),
        "asymmetric weights are for activations that are not quantized (act_bits=16), "
        "got act_bits=8: quantize the weight symmetrically.",
    ),
    (
        "smoothing factor",
        dict(smoothing_factor=torch.ones(2, 7)),
        "smoothing_factor must have shape (2, 8) for modalities ('text', 'vision') and "
        "a weight of shape (6, 8), or (1, 8), got (2, 7).",
    ),
    (
        "half a pair",
        dict(ranks=(2,), l1=torch.ones(8, 2)),
        "l1, l2 and ranks go together: give all three, or none of them.",
    ),
]


@pytest.mark.parametrize(
    "kwargs, message",
    [pytest.param(kwargs, text, id=name) for name, kwargs, text in REFUSED],
)
def test_from_integers_refuses(kwargs: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = dict(
        qdata=QDATA,
        scale=SCALE,
        weight_bits=4,
        act_bits=16,
        modalities=NAMES[:2],
        smoothing_factor=torch.ones(2, 8),
        dtype=torch.float32,
    )
    MASQuantTensor.from_integers(**whole)
    with pytest.raises((ValueError, TypeError)) as raised:
        MASQuantTensor.from_integers(**{**whole, **kwargs})
    assert str(raised.value) == message
