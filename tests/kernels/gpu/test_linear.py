# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whole linears through the Triton kernels, in the interpreter where there is no GPU."""

import itertools
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from backends import Backend, Triton
from operator_cases import DOWN, OPERATORS, PRODUCT, QUANTIZE, WEIGHT_ONLY, operands
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_masquant.tensor_subclasses import MASQuantTensor


class _Lowered(TorchDispatchMode):
    """Runs the plain-tensor operators by a backend."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "masquant" and name in OPERATORS:
            self.seen.append(name)
            return self.backend.run(name, *args, **(kwargs or {}))
        if any(issubclass(t, MASQuantTensor) for t in types):
            return NotImplemented
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case",
    ["plain", "no-tokens", "float16", "w4-groups", "int8-pair", "spans", "rotation-64"],
)
def test_linear(case: str) -> None:
    given = operands(case)
    x, bias = given.x, given.bias
    for act_bits, ids in itertools.product((8, 4, 16), (given.ids, None)):
        tensor = given.tensor(act_bits)
        results = []
        for backend in (Triton(), Backend()):
            with _Lowered(backend) as mode:
                results.append(torch.ops.masquant.linear(x, tensor, ids, bias))
        # The integers are the same; sums of float32 are in another order, and of a
        # hidden state 14 bits are left, or of smoothed tokens of 16 bits themselves
        # their 8 or 11.
        bits = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
        largest = results[1].abs().max().item() if x.numel() else 0
        tolerance = bits.get(x.dtype, 2.0**-19) * largest
        torch.testing.assert_close(*results, rtol=0, atol=tolerance)
        assert results[0].dtype == x.dtype
        mixed = ids is not None
        assert mode.seen == (
            [WEIGHT_ONLY]
            if act_bits == 16
            else [QUANTIZE, *([DOWN] if mixed else []), PRODUCT]
        )
