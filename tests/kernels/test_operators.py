# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Every case of the list, by every backend, against float64; and any case at all."""

from typing import Any

import pytest
from backends import Backend, check, every_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import (
    BF16,
    CASES,
    FP16,
    FP32,
    INT8,
    OPERATORS,
    Case,
    Operands,
    operands,
)

every_case = pytest.mark.parametrize(
    "operator, case",
    [
        pytest.param(operator, case, id=f"{operator}-{case}")
        for operator in OPERATORS
        for case in CASES
        if operator in case.operators
    ],
)


@every_case
@every_backend
def test_case(backend: Backend, operator: str, case: Case) -> None:
    check(backend, operator, operands(case.id), case.ties)


@pytest.mark.parametrize("operator", OPERATORS)
@every_backend
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.integers(1, 12),
    rotation=st.sampled_from([1, 2, 8]),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    changes=st.fixed_dictionaries(
        dict(
            tokens=st.integers(1, 40),
            out_features=st.integers(1, 40),
            weight_bits=st.sampled_from([8, 4, 3]),
            act_bits=st.integers(2, 8),
            groups=st.integers(1, 3),
            zero_point=st.booleans(),
            pair=st.sampled_from([BF16, FP16, FP32, INT8]),
            dtype=st.sampled_from([FP32, BF16, FP16]),
            ids=st.sampled_from(["shuffled", "absent", "spans", "lone"]),
            shift=st.sampled_from([0.0, 1.0]),
        )
    ),
    seed=st.integers(0, 9),
)
def test_any_call(
    backend: Backend,
    operator: str,
    width: int,
    rotation: int,
    ranks: tuple[int, ...],
    changes: dict[str, Any],
    seed: int,
) -> None:
    case = Case(
        "drawn",
        "Any call.",
        in_features=width * rotation * changes["groups"],
        ranks=ranks,
        hadamard_size=rotation,
        **changes,
    )
    # Of few levels a single tie may be more than a hundredth.
    check(backend, operator, Operands(case, seed), ties=1.0)
