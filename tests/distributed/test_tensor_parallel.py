# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A multimodal decoder on two ranks: text and image, eager, compiled, generating."""

from typing import Any

import pytest
import tiny_models
import torch
from linear_oracle import expected
from ranks import WORLD
from sharded_oracle import columns_of, split_by_columns
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from torchao_masquant import MASQuantLinear, MASQuantTensor
from torchao_masquant.distributed import tensor_parallel

WORDS = tiny_models.words


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.safetensors"
    tiny_models.recipe_of(tiny_models.qwen25_vl(), hadamard_size=16).save(path)
    return str(path)


def quantized(recipe_path: str) -> Any:
    from torchao_masquant import Recipe

    return tiny_models.quantized(tiny_models.qwen25_vl(), Recipe.load(recipe_path))


def mixed_inputs() -> Any:
    return tiny_models.batch(
        [1, *WORDS(5, 1), "image", *WORDS(4, 2)], [1, *WORDS(3, 3), "small image", 11]
    )


def text_inputs() -> Any:
    return tiny_models.batch([1, *WORDS(9, 4)], [1, *WORDS(4, 5)])


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def check_decoder(rank: int, recipe_path: str) -> None:
    single = quantized(recipe_path)
    # What two ranks should compute, in one process.
    simulated = quantized(recipe_path)
    split_by_columns(simulated, WORLD)
    model = tensor_parallel(quantized(recipe_path), mesh())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, MASQuantLinear)}
    assert len(linears) == 14
    assert all(isinstance(m.weight, DTensor) for m in linears.values())

    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, linear in linears.items():
        linear.register_forward_hook(
            lambda m, args, y, name=name: seen.append((name, plain(args[0]), plain(y)))
        )
    for inputs in (mixed_inputs(), text_inputs()):
        seen.clear()
        with torch.no_grad():
            logits = model(**inputs).logits
            by_hand = simulated(**inputs).logits
            whole = single(**inputs).logits
        # The same roundings, summed in another order in places (attention heads).
        torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
        # Other roundings, of finer steps: near, and not equal.
        assert (logits - whole).norm() < 0.1 * whole.norm()

        ids = tiny_models.true_ids(single, inputs).reshape(-1)
        assert len(seen) == len(linears)
        for name, x, y in seen:
            linear = single.get_submodule(name)
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            if "o_proj" in name or "down_proj" in name:
                # Of the sum, this rank's part is known here; the other's comes along.
                part = columns_of(linear, rank, WORLD)
                pieces = [torch.empty_like(x) for _ in range(WORLD)]
                torch.distributed.all_gather(pieces, x.contiguous())
                parts = [
                    expected(columns_of(linear, r, WORLD), pieces[r], ids)
                    for r in range(WORLD)
                ]
                reference = sum(p[0] for p in parts)
                bound = sum(p[1] for p in parts)
                assert part.in_features == x.shape[-1]
            else:
                reference, bound = expected(linear, x, ids)
                width = linear.out_features // WORLD
                mine = slice(rank * width, (rank + 1) * width)
                reference, bound = reference[:, mine], bound[:, mine]
            assert ((y - reference).abs() <= bound).all(), name


def test_decoder_is_the_single_process_one(ranks, recipe_path):
    ranks.run(check_decoder, recipe_path)


def check_compiled(rank: int, recipe_path: str) -> int:
    model = tensor_parallel(quantized(recipe_path), mesh(), src_data_rank=None)
    layers = model.get_decoder().layers
    calls = [mixed_inputs(), text_inputs()]
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        eager = [model(**inputs).logits for inputs in calls]
        # What Inductor makes of sharded weights, test_sharded_linear.py has.
        layers[0].compile(fullgraph=True, dynamic=True, backend="aot_eager")
        compiled = [model(**inputs).logits for inputs in calls]
    for a, b in zip(compiled, eager):
        # A value at the edge of two integers may go either way.
        assert (a - b).norm() < 0.03 * b.norm()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_compiled_layer(ranks, recipe_path):
    # A base-only and a mixed graph.
    assert ranks.run(check_compiled, recipe_path) == [2, 2]


def check_generation(rank: int, recipe_path: str) -> list[list[int]]:
    simulated = quantized(recipe_path)
    split_by_columns(simulated, WORLD)
    model = tensor_parallel(quantized(recipe_path), mesh())
    answers = [
        m.generate(**mixed_inputs(), max_new_tokens=6, do_sample=False)
        for m in (model, simulated)
    ]
    assert torch.equal(answers[0], answers[1])
    return answers[0].tolist()


def test_generate(ranks, recipe_path):
    first, second = ranks.run(check_generation, recipe_path)
    assert first == second


def check_refusals(rank: int, recipe_path: str) -> list[str]:
    class Three:
        """As large a mesh as it takes to see what is refused."""

        ndim = 1

        def size(self) -> int:
            return 3

    def refused(model: nn.Module, mesh: Any) -> str:
        before = [(n, type(p.data)) for n, p in model.named_parameters()]
        with pytest.raises(ValueError) as raised:
            tensor_parallel(model, mesh)
        assert before == [(n, type(p.data)) for n, p in model.named_parameters()]
        return str(raised.value)

    model = quantized(recipe_path)
    messages = [refused(model, Three())]
    model.config.get_text_config().num_attention_heads = 6
    model.config.get_text_config().num_key_value_heads = 3
    messages.append(refused(model, Three()))

    model = quantized(recipe_path)
    down = model.get_decoder().layers[0].mlp.down_proj
    down.weight = nn.Parameter(
        MASQuantTensor.from_hp(torch.randn(64, 96), weight_bits=4, group_size=32),
        requires_grad=False,
    )
    messages.append(refused(model, mesh()))
    down.weight = nn.Parameter(
        MASQuantTensor.from_hp(torch.randn(64, 96), hadamard_size=32),
        requires_grad=False,
    )
    messages.append(refused(model, mesh()))
    model.tp_plan = {**model.tp_plan, "lm_head": "packed_colwise"}
    messages.append(refused(model, mesh()))
    messages.append(refused(tiny_models.PlainModel(), mesh()))
    model = tensor_parallel(quantized(recipe_path), mesh())
    messages.append(refused(model, mesh()))
    return messages


def test_refusals(ranks, recipe_path):
    layer = "model.language_model.layers.0"
    messages = ranks.run(check_refusals, recipe_path)
    assert (
        messages[0]
        == messages[1]
        == [
            "Qwen2_5_VLForConditionalGeneration has num_attention_heads=4, which 3 ranks "
            "can't share evenly: take a number of ranks that divides 4.",
            f"{layer}.self_attn.q_proj has 64 output channels, which 3 ranks can't share "
            "evenly: take a number of ranks that divides 64.",
            f"{layer}.mlp.down_proj: 2 ranks would get 48 of its 96 input channels each, "
            "which is no multiple of 32 (4-bit integers, group size 32): take fewer ranks, "
            "or quantize it with smaller groups.",
            f"{layer}.mlp.down_proj: 2 ranks would get 48 of its 96 input channels each, "
            "which is no multiple of 32 (8-bit integers, group size 96, rotated in blocks "
            "of 32): take fewer ranks, or quantize it with smaller groups and rotations.",
            "lm_head: the model's plan shards it as 'packed_colwise', which a quantized "
            "model has no way for: shard the other linears with "
            "torch.distributed.tensor.parallel.parallelize_module.",
            "PlainModel has no tensor parallel plan: shard its linears with "
            "torch.distributed.tensor.parallel.parallelize_module.",
            f"{layer}.self_attn.q_proj is sharded already.",
        ]
    )
