# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whole linears through the Triton kernels, in the interpreter where there is no GPU."""

from typing import Any, Callable, Optional

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_masquant.kernels import gpu_lowering, reference
from torchao_masquant.tensor_subclasses import MASQuantTensor

SCHEMES = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a6": (4, 6),
    "w4a4": (4, 4),
    "w3a3": (3, 3),
    "w4a16": (4, 16),
}
OPERATORS = ["smooth_quantize", "low_rank_down", "int_linear", "weight_only_linear"]


class _Lowered(TorchDispatchMode):
    """Runs the plain-tensor operators by functions of our choice."""

    def __init__(self, function: Callable[[str], Callable[..., Any]]):
        super().__init__()
        self.function = function
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "masquant" and name in OPERATORS:
            self.seen.append(name)
            return self.function(name)(*args, **(kwargs or {}))
        if any(issubclass(t, MASQuantTensor) for t in types):
            return NotImplemented
        return func(*args, **(kwargs or {}))


def on_triton(name: str) -> Callable[..., Any]:
    operator = gpu_lowering.operators()[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        operator.check(*args, **kwargs)
        return operator.run(*args, **kwargs)

    return call


def weight(
    scheme: str,
    shape: tuple[int, int],
    group_size: Optional[int] = None,
    low_rank_bits: int = 16,
    with_shift: bool = False,
) -> MASQuantTensor:
    out_features, in_features = shape
    weight_bits, act_bits = SCHEMES[scheme]
    ranks = (3, 5)
    return MASQuantTensor.from_hp(
        torch.randn(shape) / in_features**0.5,
        weight_bits=weight_bits,
        act_bits=act_bits,
        group_size=group_size,
        symmetric=act_bits != 16,
        modalities=("text", "vision", "audio"),
        smoothing_factor=torch.rand(3, in_features) + 0.5,
        ranks=ranks,
        l1=torch.randn(in_features, sum(ranks)) / in_features**0.5,
        l2=torch.randn(sum(ranks), out_features) / 8,
        modality_bias=torch.randn(3, out_features),
        act_shift=torch.randn(3, in_features) if with_shift else None,
        low_rank_bits=low_rank_bits,
    )


def check(
    tensor: MASQuantTensor, x: torch.Tensor, ids: Optional[torch.Tensor]
) -> list[str]:
    bias = torch.randn(tensor.shape[0]).to(x.dtype)
    results = []
    for function in (on_triton, lambda name: getattr(reference, name)):
        with _Lowered(function) as mode:
            results.append(torch.ops.masquant.linear(x, tensor, ids, bias))
    # The integers are the same; sums of float32 are in another order, and of a hidden
    # state 14 bits are left, or of smoothed tokens of 16 bits themselves their 8 or 11.
    bits = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
    tolerance = bits[x.dtype] * results[1].abs().max().item() if x.numel() else 0
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
    assert results[0].dtype == x.dtype
    return mode.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = weight(scheme, (20, 48))
    x, ids = torch.randn(2, 11, 48).to(dtype), torch.arange(22).view(2, 11) // 4 % 3
    mixed = check(tensor, x, ids)
    base = check(tensor, x, None)
    if scheme == "w4a16":
        assert mixed == base == ["weight_only_linear"]
    else:
        assert mixed == ["smooth_quantize", "low_rank_down", "int_linear"]
        assert base == ["smooth_quantize", "int_linear"]


@pytest.mark.parametrize(
    "parts",
    [
        {"group_size": 16},
        {"low_rank_bits": 8},
        {"with_shift": True},
        {"group_size": 6, "low_rank_bits": 8, "with_shift": True},
    ],
    ids=str,
)
def test_parts(parts: dict[str, Any]) -> None:
    torch.manual_seed(1)
    check(weight("w4a8", (20, 48), **parts), torch.randn(13, 48), torch.arange(13) % 3)


MIXES = {
    "all one": [2] * 37,
    "alternating": [0, 1, 2] * 12 + [0],
    "spans across tiles": [0] * 11 + [1] * 17 + [0] * 2 + [2] * 7,
    "an empty modality": [0, 2] * 18 + [0],
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str) -> None:
    torch.manual_seed(2)
    check(weight("w8a8", (33, 40)), torch.randn(37, 40), torch.tensor(MIXES[mix]))


def test_no_tokens() -> None:
    tensor = weight("w8a8", (20, 48))
    check(tensor, torch.randn(0, 48), torch.zeros(0, dtype=torch.int64))
    check(tensor, torch.randn(0, 48), None)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    in_features=st.integers(2, 70),
    out_features=st.integers(1, 40),
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    seed=st.integers(0, 9),
)
def test_any_linear(
    scheme: str, in_features: int, out_features: int, ids: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    tensor = weight(scheme, (out_features, in_features))
    check(tensor, torch.randn(len(ids), in_features), torch.tensor(ids))
