# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Prints, as JSON, the graphs that a GPU would be given, made where there is none.

Dynamo and AOTAutograd trace a layer of fake tensors on "cuda" and Inductor's passes run
over what they make; nothing is compiled. Of PyTorch only what asks for a real device is
left out: rotary embedding and attention index tensors, which a build for CPUs cannot.

A script, since a process that has Triton's interpreter cannot trace for Triton.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.quantization import quantize_
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import batch, qwen25_vl
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from torchao_masquant import Recipe, calibrate, masquant_config
from torchao_masquant.routing import router_of
from torchao_masquant.tensor_subclasses import MASQuantTensor


class _Driver:
    """What Triton asks to find out which operands a kernel writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, MASQuantTensor):
        names, attributes = tensor.__tensor_flatten__()
        inner = {name: fake(getattr(tensor, name)) for name in names}
        return MASQuantTensor.__tensor_unflatten__(
            inner, attributes, tensor.shape, tensor.stride()
        )
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
    )


def function_of(kernel: Any) -> Any:
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def kernel_of(node: torch.fx.Node) -> str:
    kernel = function_of(kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


class _Done(Exception):
    """Ends a compilation once there is a graph."""


def graph_of(call: Callable[[Any], None]) -> dict[str, Any]:
    """What is called in the graph that Inductor would lower, in order.

    Args:
        call: of a compiled module, given a backend.
    """
    made: dict[str, Any] = {}

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> None:
        mode = torch._guards.detect_fake_mode(inputs)
        gm = copy.deepcopy(gm)
        gm.graph = fx_graph_cse(gm.graph)
        with V.set_fake_mode(mode):
            post_grad_passes(gm, True)
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        launches = [n for n in calls if "triton_kernel" in str(n.target)]
        made["calls"] = [str(n.target) for n in calls]
        made["kernels"] = [kernel_of(n) for n in launches]
        made["grids"] = [str(n.kwargs["grid"]) for n in launches]
        made["symbols"] = [
            str(n.meta["val"])
            for n in gm.graph.nodes
            if n.op == "placeholder" and isinstance(n.meta["val"], torch.SymInt)
        ]
        raise _Done

    torch._dynamo.reset()
    try:
        call(aot_autograd(fw_compiler=keep, inference_compiler=keep))
    except (_Done, torch._dynamo.exc.BackendCompilerFailed) as error:
        if not made:
            raise error
    return made


def remember_what_kernels_write_to() -> None:
    """PyTorch finds it out anew for every launch, which took two thirds of the time."""
    # The second is its name before torch 2.13.
    for name in ("identify_accessed_tensors", "identify_mutated_tensors"):
        identify = getattr(triton_kernel_wrap, name, None)
        if identify is not None:
            setattr(triton_kernel_wrap, name, _remembered(identify))


def _remembered(identify: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[Any, Any] = {}

    def remembered(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        parts = (
            (n, a.dtype if isinstance(a, torch.Tensor) else str(a))
            for n, a in sorted(kwargs.items())
        )
        key = function_of(kernel), *parts
        if key not in found:
            found[key] = identify(kernel, kwargs, *rest)
        return found[key]

    return remembered


@contextlib.contextmanager
def no_indexing() -> Iterator[None]:
    rotary = modeling_qwen2_5_vl.apply_rotary_pos_emb
    modeling_qwen2_5_vl.apply_rotary_pos_emb = lambda q, k, cos, sin: (q, k)
    AttentionInterface.register(
        "queries",
        lambda module, q, k, v, *rest, **options: (
            q.transpose(1, 2) + k.sum() + v.sum(),
            None,
        ),
    )
    try:
        yield
    finally:
        modeling_qwen2_5_vl.apply_rotary_pos_emb = rotary


def recipe_for(scheme: str, **options: Any) -> Recipe:
    prompts = [[21, "image", 22, 23], [24, 25, 26, 27]]
    # Nothing is searched: numbers change no graph.
    options |= {"alpha": 0.5, "separation": 1.0, "rounding": "nearest", "clip": False}
    model = qwen25_vl(layers=1).eval()
    return calibrate(model, [batch(*prompts)], scheme=scheme, rank=2, **options)


def decoder_layer(
    mode: FakeTensorMode, recipe: Recipe, hadamard_size: Optional[int] = None
) -> nn.Module:
    model = qwen25_vl(layers=1).eval()
    for name, part in recipe.layers.items():
        recipe.layers[name] = dataclasses.replace(part, hadamard_size=hadamard_size)
    quantize_(model, masquant_config(recipe))
    layer = model.bfloat16().model.language_model.layers[0]
    layer.self_attn.config._attn_implementation = "queries"
    with mode:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        fake(parameter.data), requires_grad=False
                    )
    return layer


def trace(
    mode: FakeTensorMode,
    layer: nn.Module,
    tokens: int,
    mixed: bool,
    dynamic: Optional[bool] = False,
) -> dict[str, Any]:
    with mode, torch.no_grad():
        hidden = torch.empty(2, tokens, 64, device="cuda", dtype=torch.bfloat16)
        ids = torch.empty(2, tokens, dtype=torch.int64, device="cuda")
        if dynamic:
            torch._dynamo.mark_dynamic(hidden, 1)
            torch._dynamo.mark_dynamic(ids, 1)
        router = router_of(layer.self_attn.q_proj)
        assert router is not None

        def call(backend: Any) -> None:
            compiled = torch.compile(layer, backend=backend, fullgraph=True)
            with router.explicit(ids if mixed else None):
                compiled(hidden, position_embeddings=(hidden, hidden))

        return graph_of(call)


def main() -> None:
    triton.runtime.driver.set_active(_Driver())
    remember_what_kernels_write_to()
    torch.manual_seed(0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with no_indexing():
        integers = recipe_for("w4a8")
        layer = decoder_layer(mode, integers)
        graphs = {
            "base": trace(mode, layer, 1000, mixed=False),
            "mixed": trace(mode, layer, 1000, mixed=True, dynamic=True),
            "decode": trace(mode, layer, 1, mixed=False),
        }
        with torch._functorch.config.patch(decompose_custom_triton_ops=False):
            graphs["exported"] = trace(mode, layer, 1000, mixed=True)
        weight_only = recipe_for("w4a16", group_size=32)
        layer = decoder_layer(mode, weight_only)
        graphs["weight only"] = trace(mode, layer, 1000, mixed=False)
        graphs["weight only, one token"] = trace(mode, layer, 1, mixed=False)
        layer = decoder_layer(mode, integers, hadamard_size=16)
        graphs["rotated"] = trace(mode, layer, 1000, mixed=False)
        layer = decoder_layer(mode, weight_only, hadamard_size=16)
        graphs["rotated weight only, one token"] = trace(mode, layer, 1, mixed=False)
        layer = decoder_layer(mode, recipe_for("nvfp4"))
        graphs["floats"] = trace(mode, layer, 1000, mixed=True, dynamic=True)
    print(json.dumps(graphs))


if __name__ == "__main__":
    main()
