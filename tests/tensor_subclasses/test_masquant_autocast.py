# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Under autocast a quantized linear returns what ``nn.Linear`` does: autocast's type."""

import pytest
import torch
import torch.nn.functional as F
from tensor_oracle import ids_for, make

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear
SCHEMES = ["w8a8", "w4a4", "w4a16"]
# What autocast takes on a CPU.
TYPES = [torch.bfloat16, torch.float16]


def problem(scheme: str) -> tuple[torch.Tensor, MASQuantTensor, torch.Tensor]:
    torch.manual_seed(0)
    tensor = make(scheme, shape=(24, 64), dtype=torch.float32).tensor
    return torch.randn(9, 64), tensor, ids_for(9)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_input_and_result_are_of_autocasts_type(
    scheme: str, dtype: torch.dtype
) -> None:
    x, tensor, ids = problem(scheme)
    bias = torch.randn(24)
    expected = linear(x.to(dtype), tensor, ids, bias)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(x, tensor, ids, bias)
        assert F.linear(x, torch.randn(24, 64)).dtype == y.dtype == dtype
    # What is summed in float32 stays so: nothing but the input differs.
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_of_any_type_that_autocast_casts(dtype: torch.dtype) -> None:
    x, tensor, ids = problem("w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x.to(dtype), tensor, ids, None)
        assert F.linear(x.to(dtype), torch.randn(24, 64).to(dtype)).dtype == y.dtype
    assert torch.equal(y, linear(x.to(dtype).bfloat16(), tensor, ids, None))


def test_float64_is_left_alone() -> None:
    x, tensor, ids = problem("w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x.double(), tensor, ids, None)
        assert F.linear(x.double(), torch.randn(24, 64).double()).dtype == y.dtype
    assert torch.equal(y, linear(x.double(), tensor, ids, None))


def test_only_where_it_is_on() -> None:
    x, tensor, ids = problem("w8a8")
    expected = linear(x, tensor, ids, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(linear(x, tensor, ids, None), expected)
        linear(x, tensor, ids, None)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(linear(x, tensor, ids, None), expected)


def test_a_weight_of_one_modality_in_a_plain_linear() -> None:
    x, _, _ = problem("w8a8")
    tensor = make("w8a8", shape=(24, 64), modalities=1, ranks=()).tensor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, tensor)
    assert torch.equal(y, linear(x.bfloat16(), tensor, None, None))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled(scheme: str) -> None:
    x, tensor, ids = problem(scheme)

    def call(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return linear(x, tensor, ids, None)

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = call(x, ids)
        y = torch.compile(call, fullgraph=True)(x, ids)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
