# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""torch.compile and torch.export: equal to eager, one graph for a kind of call."""

import io
from typing import Any, Callable, Iterator, Optional

import pytest
import torch
import torch.nn.functional as F
from operator_cases import operands
from operator_oracle import ids_for
from tensor_oracle import NAMES, assert_linear, assert_same, make, unrouted
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from torchao_masquant import MASQuantLinear, Router, token_modalities
from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], backend: str = "aot_eager", **kwargs: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **kwargs), counter


def assert_near(y: torch.Tensor, eager: torch.Tensor) -> None:
    """The same kernels in both: only what Inductor makes of reshapes may differ."""
    torch.testing.assert_close(y, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case, act_bits",
    [
        ("plain", 8),
        ("float16", 8),
        ("w4-groups", 4),
        ("w4-groups", 16),
        ("int8-pair", 8),
        ("int8-pair", 16),
        ("rotation-16", 8),
        ("rotation-16", 16),
    ],
)
def test_a_case_of_the_list(case: str, act_bits: int) -> None:
    """A mixed call and one of base tokens; any number of tokens in the same two graphs."""
    given = operands(case)
    tensor, bias = given.tensor(act_bits), given.bias
    backend = "inductor" if case == "w4-groups" else "aot_eager"
    f, counter = compiled(lambda x, w, i, b: linear(x, w, i, b), backend, dynamic=True)
    for count in (21, 7, 2):
        x = given.x[:count].clone()
        for ids in (given.ids[:count].clone(), None):
            y = f(x, tensor, ids, bias)
            assert_near(y, linear(x, tensor, ids, bias))
            assert_linear(y, tensor, x, ids, bias)
    assert counter.frame_count == 2


def test_values_of_ids_are_not_baked_in() -> None:
    """Two layouts of one shape: the second call runs the first one's graph."""
    tensor = make().tensor
    f, counter = compiled(lambda x, i: linear(x, tensor, i, None))
    x = torch.randn(9, 16)
    for ids in (ids_for(9), ids_for(9).flip(0), torch.zeros(9, dtype=torch.int64)):
        assert_near(f(x, ids), linear(x, tensor, ids, None))
    assert counter.frame_count == 1


def test_prefill_and_decode_are_two_graphs() -> None:
    tensor = make().tensor
    f, counter = compiled(lambda x, i: linear(x, tensor, i, None), dynamic=True)
    for length in (7, 11, 17):
        f(torch.randn(length, 16), ids_for(length))
    assert counter.frame_count == 1
    for _ in range(3):
        x = torch.randn(1, 16)
        assert_near(f(x, None), linear(x, tensor, None, None))
    assert counter.frame_count == 2


def test_weights_of_one_layout_share_a_graph() -> None:
    f, counter = compiled(lambda x, w, i: linear(x, w, i, None))
    x, ids = torch.randn(9, 16), ids_for(9)
    for seed in range(3):
        tensor = make(seed=seed).tensor
        assert_near(f(x, tensor, ids), linear(x, tensor, ids, None))
    assert counter.frame_count == 1
    # Ranks of equal sum have equal shapes, and other columns; so has a rotation.
    for other in (make(ranks=(3, 2)).tensor, make(hadamard_size=8).tensor):
        assert_near(f(x, other, ids), linear(x, other, ids, None))
    assert counter.frame_count == 3


def test_masquant_linear() -> None:
    """The module, its router told by hand; mixed calls, then base calls."""
    tensor = make("w4a8").tensor
    router = Router(NAMES[:3])
    module = MASQuantLinear.from_float(nn.Linear(16, 6), tensor, "layer", router)
    run, counter = compiled(module, "inductor", dynamic=True)
    with torch.no_grad():
        for length in (5, 8, 3):
            x, ids = torch.randn(2, length, 16), ids_for(2, length)
            with token_modalities(module, ids):
                assert_linear(run(x), tensor, x, ids, module.bias)
        for length in (4, 7):
            x = torch.randn(2, length, 16)
            with token_modalities(module, None):
                assert_linear(run(x), tensor, x, None, module.bias)
    assert counter.frame_count == 2


def test_f_linear_of_an_unrouted_weight() -> None:
    tensor = unrouted("w4a8")
    module = nn.Linear(16, 6)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    f, counter = compiled(module, dynamic=True)
    for length in (5, 9):
        x = torch.randn(length, 16)
        assert_linear(f(x), tensor, x, None, module.bias)
    assert counter.frame_count == 1


def test_calls_that_raise() -> None:
    tensor = make().tensor
    f, _ = compiled(lambda x: F.linear(x, tensor))
    with pytest.raises(Exception, match="does not know the modality of a token"):
        f(torch.randn(5, 16))
    f, _ = compiled(lambda x, i: linear(x, tensor, i, None))
    with pytest.raises(Exception, match=r"modality ids of shape \(3,\) do not match"):
        f(torch.randn(5, 16), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "base"])
def test_input_that_is_not_contiguous(mixed: bool) -> None:
    """The fake quantizer's promise of contiguous integers is one that Inductor keeps."""
    tensor = make().tensor
    given = ids_for(5) if mixed else None
    f, _ = compiled(lambda x, i: linear(x.t(), tensor, i, None), "inductor")
    x = torch.randn(16, 5)
    assert_near(f(x, given), linear(x.t(), tensor, given, None))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_a_graph_that_makes_the_subclass(scheme: str) -> None:
    """Flattened on the way in, rebuilt on the way out (copies: a graph that returns a
    view of a subclass it was given needs as_strided, which torchao has for none)."""
    tensor = make(scheme, group_size=4, low_rank_bits=8).tensor
    f, counter = compiled(lambda w: (w.clone(), w[2:5].clone(), w[:, 4:8].clone()))
    for out, eager in zip(f(tensor), (tensor, tensor[2:5], tensor[:, 4:8])):
        assert isinstance(out, MASQuantTensor)
        assert_same(out, eager)
    assert counter.frame_count == 1
    # And one that slices what it multiplies by.
    x, ids = torch.randn(5, 8), ids_for(5)
    f, _ = compiled(lambda x, w, i: linear(x, w[:4, 8:], i, None), "inductor")
    assert_near(f(x, tensor, ids), linear(x, tensor[:4, 8:], ids, None))


def test_repr_with_symbolic_sizes() -> None:
    """torch.compile prints the tensor where its traces are logged (TORCH_TRACE)."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def symbolic(t: torch.Tensor) -> torch.Tensor:
        context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * t.dim())
        return mode.from_tensor(t, symbolic_context=context)

    tensor = make().tensor._apply_fn_to_data(symbolic)
    assert isinstance(tensor.qdata.shape[0], torch.SymInt)
    assert " bytes, dtype=torch.float32" in repr(tensor)


def test_under_inference_mode_and_no_grad() -> None:
    tensor = make().tensor
    x, ids = torch.randn(5, 16), ids_for(5)
    eager = linear(x, tensor, ids, None)
    for mode in (torch.inference_mode, torch.no_grad):
        torch._dynamo.reset()
        f, _ = compiled(lambda x, i: linear(x, tensor, i, None))
        with mode():
            assert torch.equal(linear(x, tensor, ids, None), eager)
            assert_near(f(x, ids), eager)


class WithIds(nn.Module):
    def __init__(self, tensor: MASQuantTensor):
        super().__init__()
        self.weight = nn.Parameter(tensor, requires_grad=False)
        self.bias = nn.Parameter(torch.linspace(-1, 1, tensor.shape[0]))

    def forward(
        self, x: torch.Tensor, ids: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        return linear(x, self.weight, ids, self.bias)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "base"])
@pytest.mark.parametrize("scheme, low_rank_bits", [("w4a8", 8), ("w4a16", 16)])
def test_export(scheme: str, low_rank_bits: int, mixed: bool, strict: bool) -> None:
    tensor = make(scheme, low_rank_bits=low_rank_bits).tensor
    module = WithIds(tensor)
    length = torch.export.Dim("length", min=2, max=64)
    args = (torch.randn(9, 16), ids_for(9)) if mixed else (torch.randn(9, 16),)
    shapes: dict[str, Any] = {"x": {0: length}}
    if mixed:
        shapes["ids"] = {0: length}
    program = torch.export.export(module, args, dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    lowered = program.run_decompositions()
    operators = {
        str(n.target) for n in lowered.graph.nodes if "masquant" in str(n.target)
    }
    if tensor.weight_only:
        wanted = {"masquant.weight_only_linear.default"}
    else:
        wanted = {"masquant.smooth_quantize.default", "masquant.int_linear.default"}
        if mixed:
            wanted.add("masquant.low_rank_down.default")
    assert operators == wanted
    for run in (program, lowered, torch.export.load(buffer)):
        for count in (9, 2, 40):
            x = torch.randn(count, 16)
            ids = ids_for(count) if mixed else None
            with torch.no_grad():
                y = run.module()(*((x, ids) if mixed else (x,)))
            assert_linear(y, tensor, x, ids, module.bias)
