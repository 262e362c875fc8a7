# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Gradients and autocast.

A quantized linear has no gradient: rounding has none, and a straight-through estimate
is for those who train to ask for. What must not happen is a backward pass that leaves
its part out and gives the rest, which torch does for operators without an autograd
kernel, with one warning a process.
"""

import warnings
from typing import Any, Iterator

import pytest
import torch
import torch.nn.functional as F
from operator_oracle import ids_for
from tensor_oracle import assert_linear, make, unrouted
from torch import nn
from torch.autograd import forward_ad

from torchao_masquant import MASQuantLinear

linear = torch.ops.masquant.linear

NO_GRADIENT = "masquant::linear has no gradient"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module() -> MASQuantLinear:
    """Its bias requires grad, as that of every nn.Linear does at first."""
    made = MASQuantLinear.from_float(nn.Linear(16, 6), unrouted(), "layer", None)
    assert made.bias.requires_grad and not made.weight.requires_grad
    return made


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_backward_raises(scheme: str) -> None:
    """To the input, to the bias and to the weight, and with no warning in its place."""
    x, tensor = torch.randn(5, 16, requires_grad=True), make(scheme).tensor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in (ids_for(5), None):
            y = linear(x, tensor, ids, None)
            assert y.requires_grad
            with pytest.raises(RuntimeError, match=NO_GRADIENT):
                # With a part that has a gradient: the sum's must not be given alone.
                (y.sum() + x.sum()).backward()
            assert x.grad is None
        with pytest.raises(RuntimeError, match=NO_GRADIENT):
            F.linear(x, unrouted(scheme)).sum().backward()
        layer = module()
        with pytest.raises(RuntimeError, match=NO_GRADIENT):
            layer(torch.randn(5, 16)).sum().backward()
        assert layer.bias.grad is None
        # nn.Parameter(tensor) requires grad unless told otherwise.
        weight = nn.Parameter(unrouted(scheme))
        for bias in (None, torch.ones(6)):
            with pytest.raises(RuntimeError, match=NO_GRADIENT):
                linear(torch.randn(5, 16), weight, None, bias).sum().backward()
        assert weight.grad is None


def _dual(call: Any, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    "derive",
    [
        lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
        lambda call, x: torch.func.jacfwd(call)(x),
        lambda call, x: torch.func.linearize(call, x)[1](x),
        _dual,
    ],
    ids=["jvp", "jacfwd", "linearize", "dual"],
)
def test_forward_mode_raises(derive: Any) -> None:
    """Tangents of zero would say that the linear does not depend on its input."""
    bias, x = torch.zeros(6), torch.randn(5, 16)
    for scheme in ("w8a8", "w4a16"):
        tensor = unrouted(scheme)
        for grad in (torch.enable_grad(), torch.no_grad()):
            with grad, pytest.raises(RuntimeError, match=NO_GRADIENT):
                derive(lambda x: F.linear(x, tensor), x)
            with grad, pytest.raises(RuntimeError, match=NO_GRADIENT):
                derive(lambda b: linear(x, tensor, None, b), bias)


@pytest.mark.parametrize(
    "derive",
    [
        torch.func.grad,
        torch.func.jacrev,
        torch.func.hessian,
        lambda call: lambda x: torch.func.vjp(call, x)[1](torch.ones(())),
    ],
    ids=["grad", "jacrev", "hessian", "vjp"],
)
def test_other_derivatives_raise(derive: Any) -> None:
    tensor = unrouted()
    with pytest.raises(RuntimeError):
        derive(lambda x: F.linear(x, tensor).sum())(torch.randn(5, 16))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop() -> None:
    tensor, x = unrouted(), torch.randn(5, 3, 16)
    found = torch.func.vmap(lambda x: F.linear(x, tensor))(x)
    assert torch.equal(found, F.linear(x, tensor))


def test_compiled_forward_works_and_backward_raises() -> None:
    """A model whose biases require grad must compile outside of no_grad too."""
    layer = module()
    x = torch.randn(5, 16, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_linear(y, layer.weight.data, x, None, layer.bias)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        (y.sum() + x.sum()).backward()
    assert layer.bias.grad is None


def test_without_grad_nothing_is_recorded() -> None:
    layer = module()
    with torch.no_grad():
        assert not layer(torch.randn(5, 16, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert not layer(torch.randn(5, 16)).requires_grad
    assert not linear(torch.randn(5, 16), layer.weight, None, None).requires_grad


def test_forward_is_the_same_with_and_without_grad() -> None:
    """And keeps no activations: there is no backward pass to keep them for."""
    tensor, x, ids = make().tensor, torch.randn(5, 16), ids_for(5)
    bias = torch.randn(6)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        with_grad = linear(x.clone().requires_grad_(), tensor, ids, bias)
    assert kept == []
    assert torch.equal(with_grad.detach(), linear(x, tensor, ids, bias))
    with forward_ad.dual_level():
        assert torch.equal(linear(x, tensor, ids, bias), with_grad.detach())


def test_gradients_beside_a_quantized_linear() -> None:
    """detach() around it is the way to train other parts of a model."""
    layer, head = module(), nn.Linear(6, 2)
    head(layer(torch.randn(5, 16)).detach()).sum().backward()
    assert head.weight.grad is not None and (head.weight.grad != 0).any()


@pytest.mark.parametrize(
    "scheme, dtype", [("w8a8", BF16), ("w4a4", FP16), ("w4a16", BF16)]
)
def test_under_autocast_input_and_result_are_of_its_type(
    scheme: str, dtype: torch.dtype
) -> None:
    """As of ``F.linear``, whatever type the input is of, but for float64."""
    tensor, ids, bias = make(scheme, shape=(24, 64)).tensor, ids_for(9), torch.randn(24)
    plain = torch.randn(24, 64)
    for given in (FP32, BF16, FP16, torch.float64):
        x = torch.randn(9, 64).to(given)
        with torch.autocast("cpu", dtype=dtype):
            y = linear(x, tensor, ids, bias)
            assert F.linear(x, plain.to(given)).dtype == y.dtype
        # What is summed in float32 stays so: nothing but the input differs.
        cast = x if given == torch.float64 else x.to(dtype)
        assert torch.equal(y, linear(cast, tensor, ids, bias))
        if given == FP32:
            assert_linear(y, tensor, cast, ids, bias)
    alone = unrouted(scheme, shape=(24, 64))
    with torch.autocast("cpu", dtype=dtype):
        y = F.linear(torch.ones(9, 64), alone)
    assert torch.equal(y, linear(torch.ones(9, 64).to(dtype), alone, None, None))


def test_autocast_only_where_it_is_on() -> None:
    tensor, x, ids = make().tensor, torch.randn(9, 16), ids_for(9)
    expected = linear(x, tensor, ids, None)
    with torch.autocast("cpu", dtype=BF16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(linear(x, tensor, ids, None), expected)
        linear(x, tensor, ids, None)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(linear(x, tensor, ids, None), expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_autocast_compiled(scheme: str) -> None:
    tensor, x, ids = make(scheme).tensor, torch.randn(9, 16), ids_for(9)

    def call(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return linear(x, tensor, ids, None)

    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        expected = call(x, ids)
        y = torch.compile(call, backend="aot_eager", fullgraph=True)(x, ids)
    assert y.dtype == BF16 and torch.equal(y, expected)
