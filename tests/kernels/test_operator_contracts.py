# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Schemas, fake implementations, and what ``masquant::linear`` refuses."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.masquant

X = torch.linspace(-2, 2, 5 * 12).reshape(5, 12)
IDS = torch.tensor([0, 1, 2, 0, 1])
PRE_SCALE = torch.linspace(0.5, 2, 3 * 12).reshape(3, 12)
QX = (X * 60).round().to(torch.int8)
X_SCALE = torch.full((5, 1), 0.25)
Q8 = torch.arange(-42, 42).reshape(7, 12).to(torch.int8)
Q4 = torch.arange(42).reshape(7, 6).to(torch.uint8)
ZERO = torch.ones(7, 1, dtype=torch.int8)
SCALE = torch.full((7, 1), 0.5)
GROUPED = torch.full((7, 3), 0.5)
L1, L2 = torch.ones(12, 4), torch.ones(4, 7)
I1 = torch.ones(12, 4, dtype=torch.int8)
I2 = torch.ones(4, 7, dtype=torch.int8)
LOW_RANK_SCALE = torch.full((4,), 0.5)
HIDDEN = torch.ones(5, 4)
EXTRA = torch.ones(3, 7)
SHIFT = torch.ones(3, 12)
BIAS = torch.ones(7)

QUANTIZE = {
    "ids": (X, PRE_SCALE, IDS, 8),
    "no ids": (X, PRE_SCALE, None, 6),
    "int32 ids": (X, PRE_SCALE, IDS.int(), 4),
    "bfloat16": (X.bfloat16(), PRE_SCALE, IDS, 8),
    "one token": (X[:1], PRE_SCALE, IDS[:1], 8),
    "no tokens": (X[:0], PRE_SCALE, IDS[:0], 8),
    "transposed": (X.t().contiguous().t(), PRE_SCALE, IDS, 8),
    "transposed, no ids": (X.t().contiguous().t(), PRE_SCALE, None, 8),
    "strided": (torch.stack((X, X), -1)[..., 0], PRE_SCALE, IDS, 8),
    "shift": (X, PRE_SCALE, IDS, 8, SHIFT),
    "shift, no ids": (X, PRE_SCALE, None, 8, SHIFT),
    "rotation": (X, PRE_SCALE, IDS, 8, SHIFT, 4),
}
DOWN = {
    "two pairs": (QX, X_SCALE, L1, IDS, [3, 1]),
    "one pair": (QX, X_SCALE, L1, IDS, [0, 4]),
    "16 bits": (QX, X_SCALE, L1.bfloat16(), IDS, [2, 2]),
    "8 bits": (QX, X_SCALE, I1, IDS, [2, 2], LOW_RANK_SCALE),
    "no tokens": (QX[:0], X_SCALE[:0], L1, IDS[:0], [2, 2]),
    "transposed": (
        QX.t().contiguous().t(),
        X_SCALE,
        L1.t().contiguous().t(),
        IDS,
        [2, 2],
    ),
}
LINEAR = {
    "bare": (QX, X_SCALE, Q8, SCALE, None, None, None, None, None, 8, torch.float32),
    "all": (QX, X_SCALE, Q8, SCALE, HIDDEN, L2, EXTRA, IDS, BIAS, 8, torch.float32),
    "4 bits": (QX, X_SCALE, Q4, SCALE, HIDDEN, L2, EXTRA, IDS, BIAS, 4, torch.bfloat16),
    "groups": (
        QX,
        X_SCALE,
        Q8,
        GROUPED,
        None,
        None,
        None,
        None,
        BIAS,
        8,
        torch.float16,
    ),
    "4 bits, groups": (
        QX,
        X_SCALE,
        Q4,
        GROUPED,
        None,
        None,
        EXTRA,
        IDS,
        None,
        4,
        torch.float32,
    ),
    "one token": (
        QX[:1],
        X_SCALE[:1],
        Q8,
        SCALE,
        None,
        None,
        None,
        None,
        None,
        8,
        torch.float32,
    ),
    "3 bits, int8 pair": (
        QX,
        X_SCALE,
        Q4,
        SCALE,
        HIDDEN,
        I2,
        EXTRA,
        IDS,
        BIAS,
        3,
        torch.float32,
    ),
    "no tokens": (
        QX[:0],
        X_SCALE[:0],
        Q8,
        SCALE,
        HIDDEN[:0],
        L2,
        EXTRA,
        IDS[:0],
        BIAS,
        8,
        torch.bfloat16,
    ),
    "transposed": (
        QX.t().contiguous().t(),
        X_SCALE,
        Q8.t().contiguous().t(),
        SCALE,
        None,
        None,
        None,
        None,
        None,
        8,
        torch.float32,
    ),
}
GROUPED_ZERO = torch.ones(7, 3, dtype=torch.int8)
NOTHING = (None, None, None, None, None)
WEIGHT_ONLY = {
    "bare": (X, PRE_SCALE[:1], Q8, SCALE, None, *NOTHING, [], 8, torch.float32),
    "4 bits": (X, PRE_SCALE, Q4, SCALE, ZERO, *NOTHING, [], 4, torch.float32),
    "all": (
        X.bfloat16(),
        PRE_SCALE,
        Q4,
        GROUPED,
        GROUPED_ZERO,
        L1.bfloat16(),
        L2.bfloat16(),
        EXTRA,
        IDS,
        BIAS.bfloat16(),
        [1, 3],
        4,
        torch.bfloat16,
    ),
    "int8 pair": (
        X,
        PRE_SCALE,
        Q8,
        GROUPED,
        GROUPED_ZERO,
        I1,
        I2,
        EXTRA,
        IDS.int(),
        BIAS,
        [1, 3],
        8,
        torch.float16,
        LOW_RANK_SCALE,
    ),
    "one token": (X[:1], PRE_SCALE, Q4, SCALE, None, *NOTHING, [], 3, torch.float32),
    "rotation": (
        *(X, PRE_SCALE, Q4, SCALE, None, *NOTHING, [], 4, torch.float32),
        *(None, 2),
    ),
    "no tokens": (
        X[:0],
        PRE_SCALE,
        Q4,
        SCALE,
        ZERO,
        L1,
        L2,
        EXTRA,
        IDS[:0],
        BIAS,
        [2, 2],
        4,
        torch.float32,
    ),
    "transposed": (
        X.t().contiguous().t(),
        PRE_SCALE,
        Q8.t().contiguous().t(),
        SCALE,
        ZERO,
        L1.t().contiguous().t(),
        L2.t().contiguous().t(),
        EXTRA,
        IDS,
        None,
        [2, 2],
        8,
        torch.float32,
    ),
}
SAMPLES = [
    pytest.param(op, args, id=f"{op._schema.name.split('::')[1]}-{name}")
    for op, samples in (
        (ops.smooth_quantize.default, QUANTIZE),
        (ops.low_rank_down.default, DOWN),
        (ops.int_linear.default, LINEAR),
        (ops.weight_only_linear.default, WEIGHT_ONLY),
    )
    for name, args in samples.items()
]


@pytest.mark.parametrize("op, args", SAMPLES)
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """Schema, fake implementation, and tracing with dynamic shapes."""
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("op, args", SAMPLES)
def test_fakes_promise_what_the_kernels_do(op: Any, args: tuple[Any, ...]) -> None:
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    real = real if isinstance(real, tuple) else (real,)
    fake = fake if isinstance(fake, tuple) else (fake,)
    assert len(real) == len(fake)
    for r, f in zip(real, fake):
        assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device)
        assert r.stride() == f.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_linear_of_a_plain_weight_says_what_to_use(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError) as raised:
        ops.linear(X, torch.zeros(7, 12, dtype=dtype), IDS, None)
    assert str(raised.value) == (
        "masquant::linear takes a MASQuantTensor as its weight, got a plain "
        f"{dtype} tensor of shape (7, 12); use torch.nn.functional.linear for an "
        "unquantized weight."
    )


def test_schemas() -> None:
    """Saved programs hold them: a change here breaks what users have exported, but for an
    argument at the end with a default."""
    assert [
        str(getattr(ops, name).default._schema)
        for name in (
            "linear",
            "smooth_quantize",
            "low_rank_down",
            "int_linear",
            "weight_only_linear",
        )
    ] == [
        "masquant::linear(Tensor x, Tensor weight, Tensor? modality_ids=None, "
        "Tensor? bias=None, Tensor? smoothed_by=None) -> Tensor",
        "masquant::smooth_quantize(Tensor x, Tensor act_pre_scale, Tensor? "
        "modality_ids, int act_bits, Tensor? act_shift=None, int hadamard_size=1) -> "
        "(Tensor qdata, Tensor scale)",
        "masquant::low_rank_down(Tensor qdata, Tensor scale, Tensor l1, Tensor "
        "modality_ids, int[] ranks, Tensor? low_rank_scale=None) -> Tensor",
        "masquant::int_linear(Tensor qx, Tensor x_scale, Tensor qdata, Tensor scale, "
        "Tensor? low_rank_hidden, Tensor? l2, Tensor? modality_bias, Tensor? "
        "modality_ids, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor",
        "masquant::weight_only_linear(Tensor x, Tensor act_pre_scale, Tensor qdata, "
        "Tensor scale, Tensor? zero_point, Tensor? l1, Tensor? l2, Tensor? "
        "modality_bias, Tensor? modality_ids, Tensor? bias, int[] ranks, int "
        "weight_bits, ScalarType out_dtype, Tensor? low_rank_scale=None, int "
        "hadamard_size=1) -> Tensor",
    ]
