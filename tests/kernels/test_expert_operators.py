# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators of experts: what the operators for one matrix give, matrix by matrix."""

import itertools
from typing import Any, Iterator, Optional

import numpy as np
import pytest
import torch
from operator_cases import (
    BF16,
    FP16,
    INT8,
    PRODUCT,
    WEIGHT_ONLY,
    WEIGHTS,
    Case,
    Operands,
)
from operator_oracle import (
    UNIT,
    assert_within,
    int_linear_f64,
    low_rank_down_f64,
    weight_only_linear_f64,
)

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine
from torchao_masquant.kernels.expert_operators import expert_int_linear

E = 3
# Where each expert's rows end: an expert without rows (the first, one in the middle, the
# last), all rows of one expert, one row, none, and rows of experts that are elsewhere.
ENDS = {
    "even": ([3, 6, 9], 9),
    "first without": ([0, 4, 9], 9),
    "middle without": ([4, 4, 9], 9),
    "last without": ([4, 9, 9], 9),
    "one has all": ([0, 9, 9], 9),
    "one row": ([0, 0, 1], 1),
    "no rows": ([0, 0, 0], 0),
    "some elsewhere": ([2, 3, 5], 9),
    "all elsewhere": ([0, 0, 0], 4),
}
KINDS = {
    "w8": dict(),
    "w4": dict(weight_bits=4),
    "w4 groups": dict(weight_bits=4, groups=2),
    "int8 pair": dict(weight_bits=4, pair=INT8),
    "rotation": dict(hadamard_size=16),
}


def experts(rows: int, mixed: bool, **kind: Any) -> list[Operands]:
    """Of one input: each has weights of its own."""
    ids = "shuffled" if mixed else "none"
    case = Case("experts", "", tokens=rows, ids=ids, **kind)
    made = [Operands(case, seed) for seed in range(E)]
    for other in made[1:]:
        other.x, other.pre_scale = made[0].x, made[0].pre_scale
    return made


def stacked(made: list[Operands], name: str) -> Optional[torch.Tensor]:
    parts = [getattr(m, name) for m in made]
    return None if parts[0] is None else torch.stack(parts)


def arguments(operator: str, made: list[Operands], ends: list[int]) -> tuple[Any, ...]:
    first, paired = made[0], made[0].ids is not None
    pair = [stacked(made, n) if paired else None for n in ("l1", "l2")]
    weight = (stacked(made, "qdata"), stacked(made, "scale"))
    rest = (*pair, stacked(made, "modality_bias"), first.ids, stacked(made, "bias"))
    case, end = first.case, torch.tensor(ends)
    kind = (case.ranks, case.weight_bits, case.dtype, stacked(made, "low_rank_scale"))
    if operator == PRODUCT:
        return (*first.quantized, end, *weight, *rest, *kind)
    zero = stacked(made, "zero_point")
    tokens = (first.x, end, first.pre_scale)
    return (*tokens, *weight, zero, *rest, *kind, case.hadamard_size)


def expected(
    operator: str, made: list[Operands], rows: slice, expert: int
) -> tuple[np.ndarray, np.ndarray]:
    given = made[expert]
    ids = None if given.ids is None else given.ids[rows]
    if operator == WEIGHT_ONLY:
        args = given.named(WEIGHT_ONLY, x=given.x[rows], modality_ids=ids)
        found = weight_only_linear_f64(**args)
        return found.value, found.tolerance
    q, scale = (t[rows] for t in made[0].quantized)
    args = given.named(PRODUCT, qx=q, x_scale=scale, modality_ids=ids)
    args |= dict(low_rank_hidden=None, l2=None)
    found = int_linear_f64(**args)
    if ids is None:
        return found.value, found.tolerance
    ranks = given.case.ranks
    down = low_rank_down_f64(q, scale, given.l1, ids, ranks, given.low_rank_scale)
    up = given.l2.double().numpy()
    low, size = down.value @ up, found.size + down.size @ np.abs(up)
    roundings = found.roundings + down.roundings + len(up) + 1
    return found.value + low, roundings * UNIT * size


@pytest.mark.parametrize("where", ENDS)
def test_every_row_meets_its_expert(where: str) -> None:
    ends, rows = ENDS[where]
    for operator, kind, mixed in itertools.product(WEIGHTS, KINDS, (True, False)):
        made = experts(rows, mixed, **KINDS[kind])
        call = getattr(torch.ops.masquant, f"expert_{operator}")
        y = call(*arguments(operator, made, ends))
        assert y.shape == (rows, 13) and y.dtype == torch.float32
        start = 0
        for expert, end in enumerate(ends):
            if end > start:
                own = slice(start, end)
                assert_within(y[own], *expected(operator, made, own, expert))
            start = end
        assert not y[start:].any(), kind


#: experts with few rows, and with so many that they share what is unpacked of a weight
MANY = ([16, 33, 34], [1, 1, 240], [0, 130, 200])
SIZES = {
    "w8": dict(dtype=BF16, in_features=96),
    "w4": dict(weight_bits=4, dtype=FP16),
    "w4 groups": dict(weight_bits=4, groups=2, in_features=256),
    "odd": dict(weight_bits=4, groups=5, in_features=15, out_features=3, pair=INT8),
    "int8 pair": dict(weight_bits=8, in_features=68, pair=INT8, ids_dtype=torch.int32),
}


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", SIZES)
def test_bits_are_those_of_one_expert_after_the_other(kind: str) -> None:
    for ends, mixed in itertools.product(MANY, (True, False)):
        made = experts(ends[-1] + 1, mixed, **{"out_features": 130, **SIZES[kind]})
        args = list(arguments(PRODUCT, made, ends))
        expected = expert_int_linear(*args)
        assert torch.equal(torch.ops.masquant.expert_int_linear(*args), expected)
        # Of whatever layout: tokens column by column, every second expert's weights.
        qdata = args[3]
        args[0] = args[0].t().contiguous().t()
        args[2] = args[2].int()
        args[3] = torch.stack((qdata, qdata), 1).flatten(0, 1)[::2]
        args[4] = args[4].transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(torch.ops.masquant.expert_int_linear(*args), expected)


@pytest.mark.parametrize("ends", [[2, 1, 4], [1, 2, 10], [1, 2]], ids=str)
def test_ends_that_no_rows_have(ends: list[int]) -> None:
    if cpu_lowering.prepare().engine is CpuEngine.REFERENCE:
        pytest.skip("they are the caller's to keep there")
    args = list(arguments(PRODUCT, experts(9, False), [3, 6, 9]))
    args[2] = torch.tensor(ends)
    with pytest.raises((RuntimeError, IndexError), match="masquant: "):
        torch.ops.masquant.expert_int_linear(*args)


@pytest.mark.parametrize("operator", WEIGHTS)
def test_fakes_say_what_the_operators_give(operator: str) -> None:
    for kind in ("w4 groups", "int8 pair"):
        args = arguments(operator, experts(9, True, **KINDS[kind]), [1, 1, 4])
        op = getattr(torch.ops.masquant, f"expert_{operator}").default
        torch.library.opcheck(op, args)


def test_plain_weights_are_refused() -> None:
    x, weight, ends = torch.randn(4, 8), torch.randn(E, 5, 8), torch.tensor([1, 2, 4])
    with pytest.raises(TypeError, match="use torch.nn.functional.grouped_mm for unqu"):
        torch.ops.masquant.expert_linear(x, weight, ends)
