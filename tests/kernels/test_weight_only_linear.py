# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import pytest
import torch
from operator_oracle import assert_within, bfloat16_operations
from weight_only_problem import Problem

weight_only_linear = torch.ops.masquant.weight_only_linear

SHAPES = [(0, 8, 5), (1, 1, 1), (1, 33, 7), (5, 31, 3), (17, 64, 32), (33, 130, 65)]


def _operations(problem: Problem) -> int:
    return problem.operations + bfloat16_operations(problem.x)


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("weight_bits", [8, 4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    shape: tuple[int, int, int], weight_bits: int, asymmetric: bool
) -> None:
    problem = Problem(shape, weight_bits, asymmetric=asymmetric)
    y = weight_only_linear(*problem.args())
    assert_within(y, *problem.expected(), _operations(problem))
    y = weight_only_linear(*problem.args(ids=None))
    assert_within(y, *problem.expected(base_only=True), _operations(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_rank_bits", [16, 8])
@pytest.mark.parametrize("groups", [1, 2, 4, 20])
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("ranks", [(3,), (0, 4), (1, 0, 5)], ids=str)
def test_parts(
    ranks: tuple[int, ...],
    weight_bits: int,
    groups: int,
    low_rank_bits: int,
    dtype: torch.dtype,
) -> None:
    """Sums are float32's, whatever the type of the result; groups of 3 are odd."""
    problem = Problem(
        (21, 60, 13),
        weight_bits,
        groups=groups,
        ranks=ranks,
        low_rank_bits=low_rank_bits,
        dtype=dtype,
    )
    y = weight_only_linear(*problem.args())
    assert y.dtype == dtype
    assert_within(y, *problem.expected(), _operations(problem))


def test_zero_points_are_subtracted_exactly() -> None:
    """Products of small integers: float32 is exact, and int8 would have wrapped."""
    x = torch.randint(-8, 9, (5, 16)).float()
    weight = torch.full((3, 16), -128, dtype=torch.int8)
    zero_point = torch.tensor([[127], [-128], [0]], dtype=torch.int8)
    rest = (None, None, None, None, None, [], 8, torch.float32)
    y = weight_only_linear(
        x, torch.ones(1, 16), weight, torch.ones(3, 1), zero_point, *rest
    )
    expected = x.sum(1, keepdim=True) * torch.tensor([[-255.0, 0.0, -128.0]])
    assert torch.equal(y, expected)


def test_a_base_call_leaves_the_pair_alone() -> None:
    problem = Problem((9, 16, 5), 4)
    bare = weight_only_linear(*problem.args(ids=None, l1=None, l2=None))
    broken = torch.full_like(problem.l1, float("nan"))
    y = weight_only_linear(*problem.args(ids=None, l1=broken))
    assert torch.equal(y, bare)


@pytest.mark.parametrize("ids", [[0, 3, 1], [-1, 0, 1]])
def test_ids_out_of_range_raise(ids: list[int]) -> None:
    problem = Problem((3, 8, 5), 4)
    with pytest.raises(IndexError):
        weight_only_linear(*problem.args(ids=torch.tensor(ids)))


def test_ids_of_int32() -> None:
    problem = Problem((12, 16, 5), 4)
    y = weight_only_linear(*problem.args(ids=problem.ids.int()))
    assert torch.equal(y, weight_only_linear(*problem.args()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_stays_alone(value: float) -> None:
    problem = Problem((12, 16, 5), 4, low_rank_bits=8)
    clean = weight_only_linear(*problem.args())
    for m in range(3):
        broken = int((problem.ids == m).nonzero()[0])
        x = problem.x.clone()
        x[broken, 3] = value
        y = weight_only_linear(*problem.args(x=x))
        assert not torch.isfinite(y[broken]).any()
        rest = [t for t in range(12) if t != broken]
        assert torch.equal(y[rest], clean[rest])


def test_a_broken_column_stays_with_its_modality() -> None:
    problem = Problem((12, 16, 5), 4)
    clean = weight_only_linear(*problem.args())
    problem.l1[:, :2] = float("nan")
    y = weight_only_linear(*problem.args())
    others = problem.ids != 1
    assert torch.equal(y[others], clean[others])
    assert torch.isnan(y[~others]).all()


def test_non_contiguous_operands() -> None:
    problem = Problem((9, 16, 5), 8, groups=4)
    wide = torch.stack((problem.x, problem.x), -1)[..., 0]
    assert not wide.is_contiguous()
    y = weight_only_linear(
        *problem.args(
            x=wide,
            qdata=torch.from_numpy(problem.weight).t().contiguous().t(),
            scale=problem.scale.t().contiguous().t(),
            l1=problem.l1.t().contiguous().t(),
        )
    )
    assert_within(y, *problem.expected(), _operations(problem))
    assert y.is_contiguous()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_default_dtype_has_no_say(default: torch.dtype) -> None:
    problem = Problem((9, 64, 5), 4, groups=4)
    expected = weight_only_linear(*problem.args())
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        y = weight_only_linear(*problem.args())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, expected)
