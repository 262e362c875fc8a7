# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::linear`` on a MASQuantTensor, eager."""

import re
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from tensor_oracle import (
    SCHEMES,
    assert_linear,
    assert_same_linear,
    ids_for,
    make,
    unrouted,
)

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (tokens, K, N)
RAGGED = [(1, 16, 6), (2, 33, 5), (7, 31, 1), (40, 64, 24), (13, 130, 65)]


def tokens(count: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * width)
    return torch.randn(count, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", RAGGED, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_float64(
    scheme: str, ragged: tuple[int, int, int], dtype: torch.dtype
) -> None:
    count, width, out = ragged
    tensor = make(scheme, shape=(out, width), dtype=dtype).tensor
    x, ids = tokens(count, width, dtype), ids_for(count)
    bias = torch.linspace(-1, 1, out).to(dtype)
    assert_linear(linear(x, tensor, ids, bias), tensor, x, ids, bias)
    assert_linear(linear(x, tensor, None, bias), tensor, x, None, bias)


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "modality bias"])
@pytest.mark.parametrize(
    "modalities, ranks",
    [
        (1, ()),
        (2, ()),
        (2, (3,)),
        (3, (0, 4)),
        (3, (4, 0)),
        (3, (0, 0)),
        (4, (1, 0, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("low_rank_bits", [16, 8])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a16"])
def test_parts(
    scheme: str,
    group_size: Optional[int],
    low_rank_bits: int,
    modalities: int,
    ranks: tuple[int, ...],
    with_bias: bool,
) -> None:
    tensor = make(
        scheme,
        shape=(7, 24),
        modalities=modalities,
        ranks=ranks,
        with_bias=with_bias,
        group_size=group_size,
        low_rank_bits=low_rank_bits,
    ).tensor
    x, ids = tokens(15, 24), ids_for(15, modalities=modalities)
    assert_linear(linear(x, tensor, ids, None), tensor, x, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", RAGGED, ids=str)
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_pairs_of_8_bits_against_float64(
    scheme: str, ragged: tuple[int, int, int], dtype: torch.dtype
) -> None:
    count, width, out = ragged
    tensor = make(scheme, shape=(out, width), dtype=dtype, low_rank_bits=8).tensor
    assert tensor.l1.dtype == tensor.l2.dtype == torch.int8
    x, ids = tokens(count, width, dtype), ids_for(count)
    assert_linear(linear(x, tensor, ids, None), tensor, x, ids)
    assert_linear(linear(x, tensor, None, None), tensor, x, None)


@pytest.mark.parametrize("weight_bits", [8, 4, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_weight_only(
    group_size: Optional[int], symmetric: bool, weight_bits: int
) -> None:
    """Activations as they are: the dequantized weight is all there is to it."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
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
    dense = F.linear(x.double(), tensor.dequantize(torch.float64))
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
    linear(tokens(9, 16), tensor, None, None)
    assert {name for name, _ in seen} == names
    assert not pair & {id(a) for _, a in seen}
    linear(tokens(9, 16), tensor, ids_for(9), None)
    assert pair <= {id(a) for _, a in seen}


def test_type_of_the_weight_and_of_the_input_may_differ() -> None:
    tensor = make(dtype=torch.bfloat16).tensor
    x, ids = tokens(9, 16, torch.float32), ids_for(9)
    assert_linear(linear(x, tensor, ids, None), tensor, x, ids)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_mixed_equals_per_modality_row_by_row(
    scheme: str, group_size: Optional[int]
) -> None:
    """A token's result depends on nothing but the token."""
    tensor = make(scheme, shape=(6, 32), group_size=group_size).tensor
    x, ids = tokens(20, 32), ids_for(20)
    mixed = linear(x, tensor, ids, None)
    for m in range(3):
        rows = ids == m
        alone = linear(x[rows], tensor, ids[rows], None)
        assert_same_linear(mixed[rows], alone, tensor, x[rows], ids[rows])
        assert_linear(alone, tensor, x[rows], ids[rows])


def test_base_tokens_of_a_mixed_call_are_those_of_a_base_call() -> None:
    tensor = make().tensor
    x, ids = tokens(20, 16), ids_for(20)
    base = linear(x, tensor, None, None)
    assert torch.equal(linear(x, tensor, ids, None)[ids == 0], base[ids == 0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_ids_are_ids_of_zero(scheme: str) -> None:
    tensor = make(scheme).tensor
    x = tokens(9, 16)
    zeros = torch.zeros(9, dtype=torch.int64)
    bias = torch.ones(6)
    assert torch.equal(linear(x, tensor, zeros, bias), linear(x, tensor, None, bias))


def test_modalities_differ() -> None:
    """Else the tests above could not tell one modality from another."""
    tensor = make().tensor
    x = tokens(1, 16)
    ys = [linear(x, tensor, torch.tensor([m]), None) for m in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (ys[a] - ys[b]).abs().max() > 0.1


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 4), (1, 1), (2, 0)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], scheme: str) -> None:
    tensor = make(scheme).tensor
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))
    ids = ids_for(*shape)
    bias = torch.ones(6)
    y = linear(x, tensor, ids, bias)
    assert y.shape == (*shape, 6)
    flat = linear(x.reshape(-1, 16), tensor, ids.reshape(-1), bias)
    assert torch.equal(y.reshape(-1, 6), flat)
    assert_linear(y, tensor, x, ids, bias)
    assert linear(x, tensor, None, bias).shape == (*shape, 6)


def test_one_token_without_a_leading_dimension() -> None:
    tensor = make().tensor
    x = tokens(1, 16)
    y = linear(x[0], tensor, torch.tensor(2), None)
    assert torch.equal(y, linear(x, tensor, torch.tensor([2]), None)[0])


def test_non_contiguous_input_and_ids() -> None:
    tensor = make().tensor
    x, ids = torch.randn(16, 4, 3), ids_for(3, 4)
    y = linear(x.permute(2, 1, 0), tensor, ids, None)
    assert torch.equal(y, linear(x.permute(2, 1, 0).contiguous(), tensor, ids, None))
    y = linear(x.permute(1, 2, 0), tensor, ids.t(), None)
    assert torch.equal(
        y, linear(x.permute(1, 2, 0).contiguous(), tensor, ids.t().contiguous(), None)
    )


def test_keyword_arguments() -> None:
    tensor = make().tensor
    x, ids, bias = tokens(5, 16), ids_for(5), torch.ones(6)
    expected = linear(x, tensor, ids, bias)
    by_name = linear(bias=bias, modality_ids=ids, weight=tensor, x=x)
    assert torch.equal(by_name, expected)
    assert torch.equal(linear(x, tensor, bias=bias), linear(x, tensor, None, bias))
    assert torch.equal(linear(x, tensor, ids), linear(x, tensor, ids, None))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("low_rank_bits", [16, 8])
def test_a_broken_token_stays_alone(low_rank_bits: int, scheme: str) -> None:
    tensor = make(scheme, low_rank_bits=low_rank_bits).tensor
    x, ids = tokens(9, 16), ids_for(9)
    clean = linear(x, tensor, ids, None)
    for value in (float("nan"), float("inf")):
        for m in range(3):
            broken = int((ids == m).nonzero()[0])
            bad = x.clone()
            bad[broken, 3] = value
            y = linear(bad, tensor, ids, None)
            assert not torch.isfinite(y[broken]).any()
            rest = [t for t in range(9) if t != broken]
            assert torch.equal(y[rest], clean[rest])


def test_ids_on_an_unrouted_weight_change_nothing() -> None:
    tensor = unrouted()
    x = tokens(9, 16)
    assert torch.equal(
        linear(x, tensor, ids_for(9), None), linear(x, tensor, None, None)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f_linear_of_an_unrouted_weight(dtype: torch.dtype) -> None:
    tensor = unrouted(dtype=dtype)
    x, bias = tokens(9, 16, dtype), torch.ones(6, dtype=dtype)
    y = F.linear(x, tensor, bias)
    assert torch.equal(y, linear(x, tensor, None, bias))
    assert_linear(y, tensor, x, None, bias)
    assert torch.equal(F.linear(x, tensor), linear(x, tensor, None, None))
    assert torch.equal(F.linear(input=x, weight=tensor, bias=bias), y)


def test_f_linear_of_a_routed_weight_raises() -> None:
    message = (
        "torch.nn.functional.linear does not know the modality of a token, and this "
        "weight treats ('text', 'vision', 'audio') differently: call its "
        "MASQuantLinear, or torch.ops.masquant.linear with modality_ids (None for "
        "tokens that are all text)."
    )
    tensor = make().tensor
    for call in (
        lambda: F.linear(tokens(2, 16), tensor),
        lambda: F.linear(tokens(2, 16), weight=tensor, bias=torch.ones(6)),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.parametrize("inference", [True, False])
def test_aten_linear_of_a_routed_weight_raises(inference: bool) -> None:
    """Past __torch_function__; outside of inference mode it is transpose and matmul."""
    tensor = make().tensor
    with torch.inference_mode(inference):
        for bias in (None, torch.ones(6)):
            with pytest.raises(RuntimeError, match="not know the modality of a token"):
                torch.ops.aten.linear.default(tokens(2, 16), tensor, bias)
            with torch._C.DisableTorchFunctionSubclass():
                with pytest.raises(RuntimeError, match="not know the modality of a"):
                    F.linear(tokens(2, 16), tensor, bias)


def test_matmul_with_a_routed_weight_raises() -> None:
    with pytest.raises(RuntimeError, match="not know the modality of a token"):
        tokens(2, 16) @ make().tensor.t()


@pytest.mark.parametrize("op", [F.linear, linear])
def test_a_quantized_input_raises(op: object) -> None:
    """Weight and input swapped."""
    with pytest.raises(TypeError, match="takes a MASQuantTensor as its weight"):
        op(unrouted(), torch.randn(3, 16))  # type: ignore[operator]


def test_input_of_the_wrong_width() -> None:
    message = (
        "input width 15 does not match the weight's in_features=16 (input shape "
        "(4, 15), weight shape (6, 16))."
    )
    for scheme in ("w8a8", "w4a8"):
        with pytest.raises(ValueError, match=re.escape(message)):
            linear(torch.randn(4, 15), make(scheme).tensor, None, None)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("shape", [(3,), (5, 1), (1, 4), ()], ids=str)
def test_ids_of_the_wrong_shape(shape: tuple[int, ...], routed: bool) -> None:
    tensor = make().tensor if routed else unrouted()
    message = (
        f"modality ids of shape {shape} do not match the tokens of an input of shape "
        "(4, 16)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        linear(torch.randn(4, 16), tensor, torch.zeros(shape, dtype=torch.int64), None)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers(dtype: torch.dtype, routed: bool) -> None:
    """A mask or a probability in their place would be truncated to 0 and 1."""
    tensor = make().tensor if routed else unrouted()
    with pytest.raises(TypeError, match=f"modality ids are integers, got {dtype}"):
        linear(torch.randn(4, 16), tensor, torch.zeros(4, dtype=dtype), None)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, -1, 0, 0]], ids=str)
def test_ids_out_of_range_raise(ids: list[int], scheme: str) -> None:
    with pytest.raises(IndexError):
        linear(torch.randn(4, 16), make(scheme).tensor, torch.tensor(ids), None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_an_integer_input_raises(dtype: torch.dtype) -> None:
    """Its result would be cut to integers without a word."""
    with pytest.raises(TypeError, match=f"takes a floating point input, got {dtype}"):
        linear(torch.ones(4, 16).to(dtype), make().tensor, None, None)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.uint8])
def test_types_of_ids(ids_dtype: torch.dtype) -> None:
    tensor, x, ids = make().tensor, tokens(9, 16), ids_for(9)
    assert torch.equal(
        linear(x, tensor, ids.to(ids_dtype), None), linear(x, tensor, ids, None)
    )
