# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears that share an input quantize it once in a compiled graph, and only there."""

import copy
from typing import Any, Iterator

import pytest
import torch
import torch._inductor.config as inductor_config
from expecttest import assert_expected_inline
from functorch.compile import make_boxed_func
from tiny_models import batch, qwen25_vl
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantLinear, calibrate, masquant_config
from torchao_masquant.linear import share_smoothing

PROMPTS = [[21, "image", 22, 23], [24, 25, 26, 27]]


class _Operators(CustomGraphPass):
    """Keeps what each graph calls, once Inductor's own passes are done."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: Any) -> None:
        targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
        shown = [
            t.removesuffix(".default")
            for t in targets
            if t.startswith("masquant.") or "attention" in t or "_assert_async" in t
        ]
        if shown:
            self.graphs.append(shown)

    def uuid(self) -> None:
        return None


def _run_as_it_is(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """Inductor's passes and no code: what is fused is not what is asked here."""
    with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
        post_grad_passes(graph, True)
    return make_boxed_func(graph.forward)


def passes(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return compile_fx(graph, inputs, inner_compile=_run_as_it_is)


@pytest.fixture
def operators() -> Iterator[_Operators]:
    torch._dynamo.reset()
    kept = _Operators()
    with inductor_config.patch(
        post_grad_custom_post_pass=kept, force_disable_caches=True
    ):
        yield kept
    torch._dynamo.reset()


def quantized(scheme: str, **options: Any) -> Any:
    model = qwen25_vl(layers=1).eval()
    recipe = calibrate(model, [batch(*PROMPTS)], scheme=scheme, rank=2, **options)
    quantize_(model, masquant_config(recipe))
    return model


def attention(model: Any) -> Any:
    return model.get_decoder().layers[0].self_attn


def mlp(model: Any) -> Any:
    return model.get_decoder().layers[0].mlp


def source(linear: MASQuantLinear) -> Any:
    return None if linear.smoothed_by is None else linear.smoothed_by[0]


def test_who_shares() -> None:
    model = quantized("w4a8")
    q = attention(model).q_proj
    assert source(q) is None
    assert source(attention(model).k_proj) is q
    assert source(attention(model).v_proj) is q
    assert source(attention(model).o_proj) is None
    assert source(mlp(model).up_proj) is mlp(model).gate_proj
    assert source(mlp(model).down_proj) is None
    assert not [n for n, _ in model.named_modules() if "smoothed_by" in n]


def test_a_copy_shares_with_its_own() -> None:
    model = quantized("w4a8")
    copied = copy.deepcopy(model)
    assert source(attention(copied).k_proj) is attention(copied).q_proj


def test_weight_only_linears_share_their_factors() -> None:
    model = quantized("w4a16", group_size=32)
    q, k = attention(model).q_proj, attention(model).k_proj
    assert source(k) is q and source(mlp(model).up_proj) is mlp(model).gate_proj
    x, ids = torch.randn(3, 64), torch.tensor([0, 1, 0])
    expected = torch.ops.masquant.linear(x, k.weight, ids)
    shared = torch.ops.masquant.linear(x, k.weight, ids, smoothed_by=q.weight)
    assert torch.equal(shared, expected)
    # It is those of the other that are read.
    q.weight.act_pre_scale.mul_(2.0)
    shared = torch.ops.masquant.linear(x, k.weight, ids, smoothed_by=q.weight)
    assert not torch.equal(shared, expected)
    assert torch.equal(torch.ops.masquant.linear(x, k.weight, ids), expected)


def compiled_call(model: Any, mixed: bool, whole: bool) -> Any:
    language = model.get_decoder()
    inputs = batch(*PROMPTS) if mixed else batch([21, 22, 23, 24, 25], [26, 27, 28])
    with torch.no_grad():
        expected = model(**inputs).logits
        for part in [language] if whole else language.layers:
            part.compile(fullgraph=True, backend=passes)
        got = model(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return got


@pytest.mark.slow
def test_a_decoder_layer_of_base_tokens(operators: _Operators) -> None:
    compiled_call(quantized("w4a8"), mixed=False, whole=False)
    (graph,) = operators.graphs
    assert_expected_inline(
        "\n".join(graph),
        """\
masquant.smooth_quantize
masquant.int_linear
masquant.int_linear
masquant.int_linear
aten._scaled_dot_product_flash_attention_for_cpu
masquant.smooth_quantize
masquant.int_linear
masquant.smooth_quantize
masquant.int_linear
masquant.int_linear
masquant.smooth_quantize
masquant.int_linear""",
    )


@pytest.mark.slow
def test_a_language_model_of_mixed_tokens(operators: _Operators) -> None:
    compiled_call(quantized("w4a8"), mixed=True, whole=True)
    (graph,) = operators.graphs
    assert_expected_inline(
        "\n".join(graph),
        """\
masquant.smooth_quantize
masquant.low_rank_down
masquant.int_linear
masquant.low_rank_down
masquant.int_linear
masquant.low_rank_down
masquant.int_linear
aten._scaled_dot_product_flash_attention_for_cpu
masquant.smooth_quantize
masquant.low_rank_down
masquant.int_linear
masquant.smooth_quantize
masquant.low_rank_down
masquant.int_linear
masquant.low_rank_down
masquant.int_linear
masquant.smooth_quantize
masquant.low_rank_down
masquant.int_linear""",
    )


class Projections(nn.Module):
    """Two linears that read one input, and one beside them that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(16, 8)
        self.other = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) + self.other(x.flip(0))


def projections() -> Projections:
    torch.manual_seed(0)
    model = Projections()
    options: dict[str, Any] = dict(scheme="w8a8", method="rtn", modalities=["text"])
    quantize_(model, MASQuantConfig(step="prepare", **options))
    model(torch.randn(6, 16))
    quantize_(model, MASQuantConfig(step="convert", **options))
    return model


def test_an_equal_factor_on_another_input_is_not_merged(operators: _Operators) -> None:
    model = projections()
    assert source(model.other) is model.first
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, fullgraph=True, backend=passes)(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (graph,) = operators.graphs
    assert graph.count("masquant.smooth_quantize") == 2
    assert graph.count("masquant.int_linear") == 3


def test_those_of_another_rotation_smooth_for_themselves(
    operators: _Operators,
) -> None:
    model = projections()
    for linear, size in ((model.first, 8), (model.second, 8), (model.other, 4)):
        weight = linear.weight.data
        weight.hadamard_size = size
        linear.weight = nn.Parameter(weight, requires_grad=False)
    share_smoothing(model)
    assert source(model.second) is model.first and source(model.other) is None
    x = torch.randn(5, 16)
    run = torch.compile(
        lambda x: model.first(x) + model.second(x) + model.other(x),
        fullgraph=True,
        backend=passes,
    )
    with torch.no_grad():
        expected = model.first(x) + model.second(x) + model.other(x)
        torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
    (graph,) = operators.graphs
    assert graph.count("masquant.smooth_quantize") == 2
    assert graph.count("masquant.int_linear") == 3


@pytest.mark.parametrize("assign", [True, False])
def test_loading_one_weight_ends_its_sharing(assign: bool) -> None:
    model = projections()
    state = copy.deepcopy(model.first.state_dict())
    state["weight"].act_pre_scale.mul_(2.0)
    model.first.load_state_dict(state, assign=assign)
    assert source(model.second) is None
    assert source(model.other) is model.second


def test_eager_calls_read_their_own_factors() -> None:
    model = projections()
    x = torch.randn(5, 16)
    expected = model.second(x)
    model.first.weight.act_pre_scale.mul_(2.0)
    assert torch.equal(model.second(x), expected)
    share_smoothing(model)
    assert source(model.second) is None


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool) -> None:
    model = projections()
    x = torch.randn(5, 16)
    program = torch.export.export(model, (x,), strict=strict)
    assert len([n for n in program.state_dict if n.endswith("weight")]) == 3
    assert torch.equal(program.module()(x), model(x))


def test_smoothing_of_another_kind_is_refused() -> None:
    one, other = quantized("w4a8"), projections()
    with pytest.raises(ValueError, match="smoothed_by must be a weight with the same"):
        torch.ops.masquant.linear(
            torch.randn(2, 16),
            other.first.weight,
            None,
            None,
            mlp(one).gate_proj.weight,
        )
