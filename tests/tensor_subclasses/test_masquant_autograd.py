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
from tensor_oracle import assert_linear, ids_for, make, unrouted
from torch import nn
from torch.autograd import forward_ad

from torchao_masquant import MASQuantLinear

linear = torch.ops.masquant.linear

NO_GRADIENT = "masquant::linear has no gradient"


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
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "base"])
def test_backward_to_the_input_raises(mixed: bool, scheme: str) -> None:
    x = torch.randn(5, 16, requires_grad=True)
    y = linear(x, make(scheme).tensor, ids_for(5) if mixed else None, None)
    assert y.requires_grad
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        # With a part that does have a gradient: the sum's must not be given alone.
        (y.sum() + x.sum()).backward()
    assert x.grad is None


def test_backward_to_the_bias_raises() -> None:
    layer = module()
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        layer(torch.randn(5, 16)).sum().backward()
    assert layer.bias.grad is None


def test_backward_to_the_weight_raises() -> None:
    """``nn.Parameter(tensor)`` requires grad unless told otherwise."""
    weight = nn.Parameter(unrouted())
    for bias in (None, torch.ones(6)):
        with pytest.raises(RuntimeError, match=NO_GRADIENT):
            linear(torch.randn(5, 16), weight, None, bias).sum().backward()
    assert weight.grad is None


def _dual(call: Any, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
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
def test_forward_mode_raises(derive: Any, scheme: str) -> None:
    """Tangents of zero would say that the linear does not depend on its input."""
    tensor = unrouted(scheme)
    bias = torch.zeros(6)
    x = torch.randn(5, 16)
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


def test_values_inside_of_a_dual_level() -> None:
    tensor, x = unrouted(), torch.randn(5, 16)
    with forward_ad.dual_level():
        assert torch.equal(F.linear(x, tensor), linear(x, tensor))


def test_backward_through_f_linear_raises() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        F.linear(x, unrouted()).sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_works_and_backward_raises(backend: str) -> None:
    """A model whose biases require grad must compile outside of no_grad too."""
    layer = module()
    x = torch.randn(5, 16, requires_grad=True)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert_linear(y, layer.weight.data, x, None, layer.bias)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        (y.sum() + x.sum()).backward()
    assert layer.bias.grad is None


@pytest.mark.parametrize("strict", [False, True])
def test_export_outside_of_no_grad(strict: bool) -> None:
    layer = module()
    x = torch.randn(5, 16)
    program = torch.export.export(layer, (x,), strict=strict)
    y = program.module()(x)
    assert_linear(y, layer.weight.data, x, None, layer.bias)


def test_without_grad_nothing_is_recorded() -> None:
    layer = module()
    x = torch.randn(5, 16, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(torch.randn(5, 16)).requires_grad
    y = linear(torch.randn(5, 16), layer.weight, None, None)
    assert not y.requires_grad


def test_forward_is_the_same_with_and_without_grad() -> None:
    tensor, x, ids = make().tensor, torch.randn(5, 16), ids_for(5)
    bias = torch.randn(6)
    with_grad = linear(x.clone().requires_grad_(), tensor, ids, bias)
    assert torch.equal(with_grad.detach(), linear(x, tensor, ids, bias))


def test_forward_keeps_no_activations() -> None:
    """There is no backward pass to keep them for."""
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        x = torch.randn(5, 16, requires_grad=True)
        linear(x, make().tensor, ids_for(5), torch.ones(6))
    assert kept == []


def test_gradients_beside_a_quantized_linear() -> None:
    """detach() around it is the way to train other parts of a model."""
    layer = module()
    head = nn.Linear(6, 2)
    head(layer(torch.randn(5, 16)).detach()).sum().backward()
    assert head.weight.grad is not None and (head.weight.grad != 0).any()


def test_no_warning_in_place_of_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(5, 16, requires_grad=True)
        y = linear(x, make().tensor, ids_for(5), None)
        with pytest.raises(RuntimeError, match=NO_GRADIENT):
            y.sum().backward()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_of_a_linear(dtype: torch.dtype, scheme: str) -> None:
    """Input and output are of autocast's type, as those of ``F.linear`` are."""
    tensor, ids = make(scheme).tensor, ids_for(5)
    x = torch.randn(5, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, tensor, ids, torch.ones(6))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.bfloat16(), tensor, ids, torch.ones(6)))
    assert_linear(y, tensor, x.bfloat16(), ids, torch.ones(6))
    plain = unrouted(scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, plain)
    assert torch.equal(y, linear(x.bfloat16(), plain, None, None))
