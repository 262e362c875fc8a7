# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Routing under torch.compile and torch.export: same ids, few graphs, no breaks."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linear_oracle import assert_routed, linears_of, literal, recorded
from tiny_models import (
    BOS,
    HIDDEN,
    PlainModel,
    batch,
    quantized,
    qwen25_vl,
    router,
    true_ids,
    words,
)
from torch import nn
from transformers import StaticCache

from torchao_masquant import token_modalities
from torchao_masquant.routing import _carries_features

# Options that are quick to solve for.
QUICK = {"scheme": "w8a8", "alpha": 0.5, "separation": 1.0, "rounding": "nearest"}
LENGTHS = (5, 9, 21)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Graphs:
    """A backend that counts the graphs that compute something, and runs them eagerly."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += any(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward


@pytest.fixture(scope="module")
def shallow_model():
    return quantized(qwen25_vl(layers=1), **QUICK)


@pytest.fixture
def shallow(shallow_model):
    """A quantized Qwen2.5-VL of one layer: compiling takes half as long."""
    return copy.deepcopy(shallow_model)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.get_decoder().layers


def mixed(seed: int, extra: int = 0):
    """Calls of one length whose images lie elsewhere for another seed."""
    order = [["image", 11, "small image"], ["small image", "image", 11]][seed % 2]
    return batch([BOS, *order, *words(extra, seed)], seed=seed)


def text(length: int, seed: int = 0):
    return batch([BOS, *words(length - 1, seed)])


def embeds(length: int, rows: int = 2):
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(rows, length, HIDDEN, generator=generator),
        torch.randint(0, 2, (rows, length), generator=generator),
    )


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    # int8 rounding may flip: whole models are compared loosely.
    torch.testing.assert_close(a, b, rtol=0, atol=0.1)


def test_the_whole_model_on_text_is_one_graph(shallow):
    graphs = Graphs()
    compiled = torch.compile(shallow, backend=graphs, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        inputs = text(length)
        same(compiled(**inputs, use_cache=False).logits, shallow(**inputs).logits)
        assert not router(shallow).call.known and router(shallow).call.ids is None
    assert graphs.count == 1


def test_placeholders_without_features_fail_loudly(shallow):
    """Unless they are padding; and neither may what was compiled before open a door."""
    inputs = mixed(0)
    ids = inputs["input_ids"]
    all_words = text(ids.shape[1])["input_ids"]
    padding = (true_ids(shallow, inputs) == 0).long()
    compiled = torch.compile(shallow, backend="eager", fullgraph=True)

    def call(ids, mask):
        options = {"attention_mask": mask, "labels": ids, "use_cache": False}
        return compiled(input_ids=ids, **options).logits

    message = (
        "a compiled call has placeholder tokens of an image or a sound, but no features"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            call(ids, torch.ones_like(ids))
        assert not router(shallow).call.known and router(shallow).call.ids is None
        call(all_words, torch.ones_like(ids))
    wanted = shallow(input_ids=ids, attention_mask=padding).logits
    same(call(ids, padding), wanted)


def test_what_counts_as_features():
    tensor = torch.randn(1)
    for arguments, wanted in (
        ({"pixel_values": tensor}, True),
        ({"input_features": tensor.bfloat16()}, True),
        ({"images": [tensor]}, True),
        ({"mm_encoder_outputs": {"image": tensor}}, True),
        ({"mm_encoder_outputs": {}}, False),
        ({"mm_encoder_outputs": {"image": None}}, False),
        ({"pixel_values": None, "image_grid_thw": torch.ones(1, 3).long()}, False),
        ({"images": []}, False),
        ({"attention_mask": tensor, "inputs_embeds": tensor}, False),
        ({"attention_mask": {"full_attention": tensor}}, False),
        # It stays with every step of a generate().
        ({"video_second_per_grid": tensor}, False),
        ({"input_ids": torch.ones(1, 1).long(), "use_cache": True}, False),
    ):
        assert _carries_features(arguments) is wanted, arguments


def test_every_linear_of_a_compiled_layer_is_routed(vl):
    """The recording hooks are compiled along; their linears are checked one by one."""
    layer = layers_of(vl)[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with recorded(layer) as calls:
        for length in (6, 9):
            x, ids = embeds(length)
            rotary = vl.model.language_model.rotary_emb(
                x, torch.arange(length).expand(3, 2, length)
            )
            for these in (ids, 1 - ids, torch.zeros_like(ids)):
                calls.clear()
                with token_modalities(layer, these):
                    compiled(x, position_embeddings=rotary)
                assert_routed(calls, these, linears=7)


def test_layers_compile_once_for_all_of_them():
    """As many graphs for three layers as for one: nothing of one layer is baked in."""
    model = quantized(qwen25_vl(layers=3), **QUICK)
    wanted = [model(**i).logits for i in (mixed(0), mixed(1), text(9), text(6))]
    graphs = Graphs()
    for layer in layers_of(model):
        layer.compile(fullgraph=True, backend=graphs, dynamic=True)
    for inputs, logits in zip((mixed(0), mixed(1), text(9), text(6)), wanted):
        same(model(**inputs, use_cache=False).logits, logits)
    assert graphs.count == 2


def test_generate_takes_three_graphs_of_the_language_model(shallow):
    """Prefills of both kinds, and decoding, over any length."""
    graphs = Graphs()
    shallow.get_decoder().compile(fullgraph=True, dynamic=True, backend=graphs)
    for inputs in (text(6), mixed(0), text(9), mixed(1, extra=3), text(5)):
        shallow.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert graphs.count == 3


def test_decode_steps_with_a_static_cache_share_a_graph(shallow):
    """After a mixed prefill; and as many graphs as the unquantized model needs."""
    counts = []
    for model in (qwen25_vl(layers=1), shallow):
        torch._dynamo.reset()
        part, graphs = model.get_decoder(), Graphs()
        compiled = torch.compile(part, fullgraph=True, backend=graphs)
        cache = StaticCache(config=part.config, max_cache_len=32)
        x, ids = embeds(6, rows=1)
        modalities = [ids, *[None] * 4]
        for step, these in enumerate(modalities):
            start = 0 if step == 0 else 5 + step
            arguments = {
                "inputs_embeds": x if step == 0 else embeds(1, rows=1)[0],
                "past_key_values": cache,
                "position_ids": (start + torch.arange(6 if step == 0 else 1)).expand(
                    3, 1, -1
                ),
            }
            if linears_of(model):
                with token_modalities(model, these):
                    compiled(**arguments)
            else:
                compiled(**arguments)
            if step == 2:
                counts.append(graphs.count)
        assert graphs.count == counts[-1]
    assert counts[0] == counts[1]


def test_ids_are_data_not_constants(plain):
    graphs = Graphs()
    compiled = torch.compile(plain, fullgraph=True, backend=graphs, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 5), (2, 5), (3, 7)):
        x = torch.randn(*shape, 16, generator=generator)
        ids = torch.randint(0, 3, shape, generator=generator)
        with token_modalities(plain, ids):
            torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-4)
    assert graphs.count == 1


def test_a_block_inside_the_compiled_region(plain):
    def step(x, ids):
        with token_modalities(plain, ids):
            return plain(x) + 1

    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    x = torch.randn(2, 5, 16)
    for seed in range(3):
        ids = torch.randint(0, 3, (2, 5), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x, ids), step(x, ids), rtol=0, atol=1e-4)
        assert not router(plain).call.known
    assert graphs.count == 1


def test_no_block_around_a_compiled_model_raises(plain):
    compiled = torch.compile(plain, backend="eager")
    with pytest.raises(
        Exception, match="first: the modality of its tokens is not known"
    ):
        compiled(torch.randn(1, 2, 16))
    with token_modalities(plain, torch.tensor([[1, 0]])):
        compiled(torch.randn(1, 2, 16))
    # A graph that has been compiled for a block is not taken without one.
    with pytest.raises(
        Exception, match="first: the modality of its tokens is not known"
    ):
        compiled(torch.randn(1, 2, 16))


@pytest.mark.slow
def test_a_mixed_call_of_the_whole_model_is_routed(shallow):
    compiled = torch.compile(shallow, backend="eager")
    # The same image, elsewhere: its tower has nothing to compile again.
    orders = ([BOS, "image", 11, 12], [BOS, 11, "image", 12])
    with recorded(shallow) as calls:
        for inputs in map(batch, orders):
            calls.clear()
            found = compiled(**inputs, use_cache=False).logits
            assert_routed(calls, true_ids(shallow, inputs), linears=7)
            same(found, shallow(**inputs).logits)
            assert not router(shallow).call.known and router(shallow).call.ids is None


def test_an_exception_inside_a_compiled_model(shallow):
    @torch.compiler.disable
    def fail(*_):
        assert router(shallow).call.known
        raise KeyboardInterrupt

    compiled = torch.compile(shallow, backend="eager")
    layers_of(shallow)[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        compiled(**text(6), use_cache=False)
    assert not router(shallow).call.known and router(shallow).call.ids is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "forward"])
def test_generate_with_a_compiled_model(shallow, how):
    """generate() runs the towers first and passes on what they made of the pixels."""
    inputs = mixed(0)
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "suppress_tokens": list(range(10)),
        "cache_implementation": "static",
        "disable_compile": True,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    wanted = shallow.generate(**inputs, **options)
    if how == "module":
        shallow.compile(backend="eager")
    else:
        # The idiom of transformers' own documentation.
        shallow.forward = torch.compile(shallow.forward, backend="eager")
    with recorded(shallow) as calls:
        found = shallow.generate(**inputs, **options)
    ids = true_ids(shallow, inputs)
    for call in calls:
        decoding = call.x.shape[1] == 1
        assert_routed([call], torch.zeros(1, 1, dtype=torch.int64) if decoding else ids)
    assert len(calls) == 4 * 7
    same(found.logits[0], wanted.logits[0])
    assert not router(shallow).call.known


def run_in_threads(call, inputs, wanted, threads=4, steps=8):
    def work(worker):
        wrong = []
        with torch.no_grad():
            for step in range(steps):
                index = (worker + step) % len(inputs)
                logits = call(**inputs[index], use_cache=False).logits
                if not torch.allclose(logits, wanted[index], rtol=0, atol=1e-3):
                    wrong.append(index)
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        return [w for found in pool.map(work, range(threads)) for w in found]


def test_an_eager_call_while_another_thread_compiles(vl, plain):
    """torch.compiler.is_compiling() is true then on every thread, also on this one."""
    compiling, done = threading.Event(), threading.Event()

    def backend(graph, example_inputs):
        compiling.set()
        assert done.wait(60)
        return graph.forward

    chunk = torch.tensor([[11, 5]])
    worker = threading.Thread(
        target=torch.compile(lambda x: x + 1, backend=backend), args=(torch.ones(3),)
    )
    worker.start()
    try:
        assert compiling.wait(60)
        with recorded(vl) as calls:
            vl(input_ids=chunk, use_cache=False)
        assert_routed(calls, torch.tensor([[0, 1]]), linears=14)
        with pytest.raises(ValueError, match="modality ids index"):
            with token_modalities(plain, torch.tensor([[7]])):
                raise AssertionError("not to be reached")
    finally:
        done.set()
        worker.join()


def test_threads_on_a_compiled_model_meet_the_graph_of_the_first(shallow):
    inputs = [text(8, seed) for seed in range(4)]
    wanted = [shallow(**i).logits for i in inputs]
    graphs = Graphs()
    compiled = torch.compile(shallow, fullgraph=True, backend=graphs)
    compiled(**inputs[0], use_cache=False)
    assert run_in_threads(compiled, inputs, wanted) == []
    assert graphs.count == 1


def test_threads_that_compile_at_the_same_time(shallow):
    """Threads that miss together compile together: more graphs, the same results."""
    inputs = [mixed(0), mixed(1), text(11)]
    wanted = [shallow(**i).logits for i in inputs]
    for layer in layers_of(shallow):
        layer.compile(backend="eager")
    assert run_in_threads(shallow, inputs, wanted) == []
    assert not router(shallow).call.known


class Exportable(nn.Module):
    """A part of a model with the modality ids as an input."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x, ids):
        with token_modalities(self.part, ids):
            if isinstance(self.part, PlainModel):
                return self.part(x)
            return self.part(inputs_embeds=x, use_cache=False)[0]


def test_export_of_a_plain_model(plain):
    length = torch.export.Dim("length", min=2, max=64)
    model = Exportable(plain)
    x, ids = torch.randn(2, 5, 16), torch.tensor([[0, 1, 2, 0, 1]] * 2)
    program = torch.export.export(
        model, (x, ids), dynamic_shapes=({1: length}, {1: length})
    )
    for size in (5, 9):
        x = torch.randn(2, size, 16)
        for seed in range(2):
            ids = torch.randint(
                0, 3, (2, size), generator=torch.Generator().manual_seed(seed)
            )
            found = program.module()(x, ids)
            torch.testing.assert_close(found, model(x, ids), rtol=0, atol=1e-4)
            assert not torch.allclose(found, model(x, 0 * ids), atol=1e-4)
    assert not router(plain).call.known


def test_export_of_a_language_model(shallow):
    part = shallow.model.language_model
    model = Exportable(part).eval()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model, embeds(8, rows=1), dynamic_shapes=({1: length},) * 2, strict=False
    )
    for size in (8, 13):
        x, ids = embeds(size, rows=1)
        same(program.module()(x, ids), model(x, ids))
        same(program.module()(x, 1 - ids), model(x, 1 - ids))
        assert (model(x, 1 - ids) - model(x, ids)).abs().max() > 0.1


def test_messages_of_a_compiled_call(plain):
    """A shape that does not fit says so under compile too, not in a kernel's words."""
    compiled = torch.compile(plain, backend="eager", dynamic=True)
    with token_modalities(plain, torch.tensor([[1, 2, 0]])):
        with pytest.raises(Exception, match=literal("first: input of shape")):
            compiled(torch.randn(1, 2, 16))
