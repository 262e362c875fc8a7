# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Schemas, fake implementations, and what ``masquant::linear`` refuses."""

import pytest
import torch
from operator_cases import BY_ID, OPERATORS, WEIGHTS, operands
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.masquant

# Those that differ in types, in layout, or in what is there at all.
TELLING = (
    "plain",
    "no-tokens",
    "one-token",
    "no-ids",
    "int32-ids",
    "bfloat16",
    "shift",
)
TELLING += ("w4-groups", "int8-pair", "no-modality-bias", "rotation-16", "transposed")
TELLING += ("spread", "symmetric")


@pytest.mark.parametrize("case", TELLING)
def test_what_is_promised_to_tracers(case: str) -> None:
    """Schema, fake implementation, and tracing with dynamic shapes."""
    for operator in BY_ID[case].operators:
        assert_promised(operator, case)


def assert_promised(operator: str, case: str) -> None:
    op, args = getattr(ops, operator).default, operands(case).args(operator)
    torch.library.opcheck(op, args)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_linear_of_a_plain_weight_says_what_to_use(dtype: torch.dtype) -> None:
    given = operands("plain")
    with pytest.raises(TypeError) as raised:
        ops.linear(given.x, torch.zeros(7, 48, dtype=dtype), given.ids, None)
    assert str(raised.value) == (
        "masquant::linear takes a MASQuantTensor as its weight, got a plain "
        f"{dtype} tensor of shape (7, 48); use torch.nn.functional.linear for an "
        "unquantized weight."
    )


def test_schemas() -> None:
    """Saved programs hold them: a change here breaks what users have exported, but for an
    argument at the end with a default."""
    names = ("linear", *OPERATORS, *(f"expert_{o}" for o in ("linear", *WEIGHTS)))
    names = (*names, "expert_float_linear")
    assert [str(getattr(ops, name).default._schema) for name in names] == [
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
        "masquant::expert_linear(Tensor x, Tensor weight, Tensor ends, Tensor? "
        "rows=None, Tensor? modality_ids=None, Tensor? bias=None) -> Tensor",
        "masquant::expert_int_linear(Tensor qx, Tensor x_scale, Tensor ends, Tensor "
        "qdata, Tensor scale, Tensor? l1, Tensor? l2, Tensor? modality_bias, Tensor? "
        "modality_ids, Tensor? bias, int[] ranks, int weight_bits, ScalarType "
        "out_dtype, Tensor? low_rank_scale=None) -> Tensor",
        "masquant::expert_weight_only_linear(Tensor x, Tensor ends, Tensor "
        "act_pre_scale, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? l1, "
        "Tensor? l2, Tensor? modality_bias, Tensor? modality_ids, Tensor? bias, "
        "int[] ranks, int weight_bits, ScalarType out_dtype, Tensor? "
        "low_rank_scale=None, int hadamard_size=1) -> Tensor",
        "masquant::expert_float_linear(Tensor qx, Tensor x_scale, Tensor? token_scale, "
        "Tensor ends, Tensor qdata, Tensor scale, Tensor? row_scale, Tensor? l1, Tensor? "
        "l2, Tensor? modality_bias, Tensor? modality_ids, Tensor? bias, int[] ranks, str "
        "act_format, str? weight_format, int weight_bits, ScalarType out_dtype, Tensor? "
        "low_rank_scale=None) -> Tensor",
    ]
