# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::linear`` on a MASQuantTensor: the operators' list of cases, whole linears."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_cases import BF16, CASES, FP16, FP32, FP64, PRODUCT, Case, operands
from operator_oracle import ids_for
from tensor_oracle import assert_linear, assert_same_linear, make, unrouted

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear

# A tensor has at least two channels, and no weights of 6 bits.
_NOT_OF_A_TENSOR = ("smallest", "one-channel", "w6", "subnormals", "a7")
WHOLE = [c for c in CASES if c.id not in _NOT_OF_A_TENSOR]


def tokens(count: int, width: int = 16, dtype: torch.dtype = FP32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * width)
    return torch.randn(count, width, generator=generator).to(dtype)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_every_case(case: Case) -> None:
    given = operands(case.id)
    fewer, none = [4] if PRODUCT in case.operators else [], [16]
    for act_bits in (case.act_bits, *fewer, *(none if case.dtype != FP64 else [])):
        tensor = given.tensor(act_bits)
        assert tensor.weight_only == (act_bits == 16)
        for ids in (given.ids, None):
            y = linear(given.x, tensor, ids, given.bias)
            assert_linear(y, tensor, given.x, ids, given.bias)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weight_bits", [8, 4, 3])
def test_weights_alone(weight_bits: int, symmetric: bool) -> None:
    """Activations as they are: the dequantized weight is all there is to it."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for group_size in (None, 8):
        tensor = MASQuantTensor.from_hp(
            weight,
            weight_bits=weight_bits,
            act_bits=16,
            group_size=group_size,
            symmetric=symmetric,
        )
        assert tensor.weight_only and tensor.symmetric == symmetric
        x = tokens(9, 32)
        y = F.linear(x, tensor)
        assert_linear(y, tensor, x, None)
        dense = F.linear(x.double(), tensor.dequantize(FP64))
        torch.testing.assert_close(y.double(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheme, names",
    [
        ("w4a8", {"smooth_quantize", "int_linear"}),
        ("w4a16", {"weight_only_linear"}),
    ],
)
def test_a_base_call_hands_no_pair_on(
    scheme: str, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No low-rank work, whatever an operator would do with a pair."""
    seen: list[tuple[str, Any]] = []
    every = ("smooth_quantize", "low_rank_down", "int_linear", "weight_only_linear")
    for name in every:
        operator = getattr(torch.ops.masquant, name)
        monkeypatch.setattr(
            torch.ops.masquant,
            name,
            lambda *args, name=name, operator=operator: (
                seen.extend((name, a) for a in args) or operator(*args)
            ),
        )
    tensor = make(scheme, low_rank_bits=8).tensor
    pair = {id(getattr(tensor, n)) for n in ("l1", "l2", "low_rank_scale")}
    linear(tokens(9), tensor, None, None)
    assert {name for name, _ in seen} == names
    assert not pair & {id(a) for _, a in seen}
    linear(tokens(9), tensor, ids_for(9), None)
    assert pair <= {id(a) for _, a in seen}


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_a_tokens_result_depends_on_the_token_alone(
    scheme: str, group_size: int
) -> None:
    """A mixed call equals calls of each modality's tokens."""
    tensor = make(scheme, shape=(6, 32), group_size=group_size).tensor
    x, ids = tokens(20, 32), ids_for(20)
    mixed = linear(x, tensor, ids, None)
    for m in range(3):
        rows = ids == m
        alone = linear(x[rows], tensor, ids[rows], None)
        assert_same_linear(mixed[rows], alone, tensor, x[rows], ids[rows])
    zeros = torch.zeros(20, dtype=torch.int64)
    base = linear(x, tensor, None, None)
    assert torch.equal(linear(x, tensor, zeros, None), base)
    assert scheme == "w4a16" or torch.equal(mixed[ids == 0], base[ids == 0])


def test_modalities_differ() -> None:
    """Else the tests above could not tell one modality from another."""
    tensor = make().tensor
    x = tokens(1)
    ys = [linear(x, tensor, torch.tensor([m]), None) for m in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (ys[a] - ys[b]).abs().max() > 0.1


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_leading_dimensions(scheme: str) -> None:
    tensor, bias = make(scheme).tensor, torch.ones(6)
    for shape in ((4,), (2, 5), (2, 3, 4), (1, 1), (2, 0)):
        x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))
        ids = ids_for(*shape)
        y = linear(x, tensor, ids, bias)
        assert y.shape == (*shape, 6)
        flat = linear(x.reshape(-1, 16), tensor, ids.reshape(-1), bias)
        assert torch.equal(y.reshape(-1, 6), flat)
        assert linear(x, tensor, None, bias).shape == (*shape, 6)
    # One token without any.
    x = tokens(1)
    y = linear(x[0], tensor, torch.tensor(2), None)
    assert torch.equal(y, linear(x, tensor, torch.tensor([2]), None)[0])


def test_permuted_input_and_ids() -> None:
    tensor = make().tensor
    x, ids = torch.randn(16, 4, 3), ids_for(3, 4)
    for x, ids in ((x.permute(2, 1, 0), ids), (x.permute(1, 2, 0), ids.t())):
        y = linear(x, tensor, ids, None)
        assert torch.equal(y, linear(x.contiguous(), tensor, ids.contiguous(), None))


def test_keyword_arguments() -> None:
    tensor = make().tensor
    x, ids, bias = tokens(5), ids_for(5), torch.ones(6)
    by_name = linear(bias=bias, modality_ids=ids, weight=tensor, x=x)
    assert torch.equal(by_name, linear(x, tensor, ids, bias))
    assert torch.equal(linear(x, tensor, bias=bias), linear(x, tensor, None, bias))
    assert torch.equal(linear(x, tensor, ids), linear(x, tensor, ids, None))


def test_type_of_the_weight_and_of_the_input_may_differ() -> None:
    tensor, x, ids = make(dtype=BF16).tensor, tokens(9), ids_for(9)
    assert_linear(linear(x, tensor, ids, None), tensor, x, ids)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_f_linear_of_an_unrouted_weight(dtype: torch.dtype) -> None:
    tensor = unrouted(dtype=dtype)
    x, bias = tokens(9, dtype=dtype), torch.ones(6, dtype=dtype)
    y = F.linear(x, tensor, bias)
    assert torch.equal(y, linear(x, tensor, None, bias))
    assert_linear(y, tensor, x, None, bias)
    assert torch.equal(F.linear(x, tensor), linear(x, tensor, None, None))
    assert torch.equal(F.linear(input=x, weight=tensor, bias=bias), y)
    # Ids change nothing of it.
    assert torch.equal(linear(x, tensor, ids_for(9), bias), y)


def test_f_linear_of_a_routed_weight_raises() -> None:
    message = (
        "torch.nn.functional.linear does not know the modality of a token, and this "
        "weight treats ('text', 'vision', 'audio') differently: call its "
        "MASQuantLinear, or torch.ops.masquant.linear with modality_ids (None for "
        "tokens that are all text)."
    )
    tensor = make().tensor
    for call in (
        lambda: F.linear(tokens(2), tensor),
        lambda: F.linear(tokens(2), weight=tensor, bias=torch.ones(6)),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.parametrize("inference", [True, False])
def test_past_torch_function_a_routed_weight_raises(inference: bool) -> None:
    """Outside of inference mode ``aten::linear`` is a transpose and a matmul."""
    tensor, x = make().tensor, tokens(2)
    match = "not know the modality of a token"
    with torch.inference_mode(inference):
        for bias in (None, torch.ones(6)):
            with pytest.raises(RuntimeError, match=match):
                torch.ops.aten.linear.default(x, tensor, bias)
            with torch._C.DisableTorchFunctionSubclass():
                with pytest.raises(RuntimeError, match=match):
                    F.linear(x, tensor, bias)
        with pytest.raises(RuntimeError, match=match):
            x @ tensor.t()


@pytest.mark.parametrize("routed", [True, False])
def test_calls_that_do_not_fit(routed: bool) -> None:
    tensor, x = make().tensor if routed else unrouted(), torch.randn(4, 16)
    ids = torch.zeros(4, dtype=torch.int64)
    # Weight and input swapped.
    for op in (F.linear, linear):
        with pytest.raises(TypeError, match="takes a MASQuantTensor as its weight"):
            op(unrouted(), torch.randn(3, 16))
    message = (
        "input width 15 does not match the weight's in_features=16 (input shape "
        "(4, 15), weight shape (6, 16))."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        linear(x[:, :15], tensor, None, None)
    for shape in ((3,), (5, 1), (1, 4), ()):
        message = (
            f"modality ids of shape {shape} do not match the tokens of an input of "
            "shape (4, 16)."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            linear(x, tensor, torch.zeros(shape, dtype=torch.int64), None)
    # A mask or a probability in their place would be truncated to 0 and 1.
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"modality ids are integers, got {dtype}"):
            linear(x, tensor, ids.to(dtype), None)
    # A result would be cut to integers without a word.
    for dtype in (torch.int32, torch.int8, torch.bool):
        with pytest.raises(TypeError, match=f"a floating point input, got {dtype}"):
            linear(x.to(dtype), tensor, None, None)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, -1, 0, 0]], ids=str)
def test_ids_out_of_range_raise(ids: list[int], scheme: str) -> None:
    with pytest.raises(IndexError):
        linear(torch.randn(4, 16), make(scheme).tensor, torch.tensor(ids), None)
