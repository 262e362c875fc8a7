# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One call's modality ids never reach another call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linear_oracle import assert_routed, linears_of, recorded
from tiny_models import (
    AUDIO,
    BOS,
    HIDDEN,
    IMAGE,
    PlainModel,
    batch,
    quantized,
    qwen25_vl,
    router,
    true_ids,
    words,
)

from torchao_masquant import token_modalities


def prompts(seed: int, audio: bool = False):
    """Inputs of one shape whose tokens are arranged differently for every seed."""
    parts = ["image", "small image", "video", 11, 12, 13]
    if audio:
        parts.append("audio")
    order = torch.randperm(
        len(parts), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return batch([BOS, *(parts[i] for i in order)], seed=seed, audio=audio)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def test_a_mixed_batch_of_every_kind(omni):
    inputs = batch(
        [BOS, *words(3), "image", 11],
        [BOS, "small image", "video", "audio", 12],
        [BOS, *words(2)],
        seed=3,
        audio=True,
    )
    ids = true_ids(omni, inputs)
    assert set(ids.unique().tolist()) == {0, 1, 2}
    with recorded(omni) as calls:
        omni(**inputs)
    assert_routed(calls, ids, linears=14)
    assert not router(omni).call.known and router(omni).call.ids is None


def test_positional_arguments(vl):
    inputs = prompts(0)
    mask = inputs["attention_mask"].clone()
    mask[:, :3] = 0
    ids = true_ids(vl, {**inputs, "attention_mask": mask})
    features = {k: v for k, v in inputs.items() if "mask" not in k and "ids" not in k}
    with recorded(vl) as calls:
        vl(inputs["input_ids"], mask, **features)
    assert_routed(calls, ids, linears=14)


def test_one_placeholder_token_is_routed_as_such_also_with_a_cache(omni):
    start = omni(input_ids=torch.tensor([[BOS, 11]]), use_cache=True)
    for token, index in ((IMAGE, 1), (AUDIO, 2), (12, 0)):
        with recorded(omni) as calls:
            omni(
                input_ids=torch.tensor([[token]]), past_key_values=start.past_key_values
            )
        start.past_key_values.crop(-1)
        assert_routed(calls, torch.tensor([[index]]), linears=14)


def test_two_models_interleaved(vl, omni):
    other = quantized(qwen25_vl(seed=9))
    for step in range(3):
        for model, audio in ((vl, False), (omni, True), (other, False)):
            inputs = prompts(step, audio)
            with recorded(model) as calls:
                model(**inputs)
            assert_routed(calls, true_ids(model, inputs), linears=14)
    # One model called from inside the other.
    seen = []
    inner, outer = prompts(1), prompts(2, audio=True)

    def call_other(*_):
        assert router(vl).call.known is False
        with recorded(vl) as calls:
            vl(**inner)
        seen.append(calls)

    first = next(iter(linears_of(omni).values()))
    first.register_forward_pre_hook(call_other)
    with recorded(omni) as calls:
        omni(**outer)
    assert_routed(calls, true_ids(omni, outer), linears=14)
    assert_routed(seen[0], true_ids(vl, inner), linears=14)


def test_a_block_of_one_model_says_nothing_of_another(plain):
    other = quantized(PlainModel(seed=4))
    x = torch.randn(1, 2, 16)
    with token_modalities(plain, torch.tensor([[1, 2]])):
        with pytest.raises(RuntimeError, match="first: the modality of its tokens"):
            other(x)


def test_threads_meet_in_the_middle_of_a_call(vl):
    """Two calls that are certain to overlap: each waits for the other in layer 1."""
    barrier = threading.Barrier(2, timeout=30)
    layer = vl.model.language_model.layers[1]
    inputs = [prompts(1), batch([BOS, *words(14)])]
    wanted = [vl(**i).logits for i in inputs]

    def meet(*_):
        barrier.wait()

    layer.register_forward_pre_hook(meet)

    def work(index: int) -> torch.Tensor:
        with torch.no_grad():
            return vl(**inputs[index]).logits

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    assert close(found[0], wanted[0]) and close(found[1], wanted[1])


def test_a_block_holds_on_its_thread_only(plain):
    x = torch.randn(1, 2, 16)
    with token_modalities(plain, torch.tensor([[1, 2]])):
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(plain, x).exception()
            assert isinstance(error, RuntimeError)
            assert "the modality of its tokens is not known" in str(error)
        plain(x)


def test_blocks_on_two_threads(plain):
    barrier = threading.Barrier(2, timeout=30)
    x = torch.randn(1, 3, 16)
    ids = [torch.tensor([[1, 2, 0]]), torch.tensor([[0, 1, 1]])]
    wanted = []
    for i in ids:
        with token_modalities(plain, i):
            wanted.append(plain(x))

    def work(index: int) -> bool:
        with torch.no_grad():
            for _ in range(20):
                with token_modalities(plain, ids[index]):
                    barrier.wait()
                    found = plain(x)
                    barrier.wait()
                if not torch.equal(found, wanted[index]):
                    return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]


def test_a_nested_call_of_the_same_model(vl):
    inner, outer = batch([BOS, "small image", 11]), batch([BOS, 12, "image", "video"])
    text = batch([BOS, 11, 12])
    layer = vl.model.language_model.layers[1]
    pending, nested = [inner, text], []

    def call_again(*_):
        if pending:
            nested.append(vl(**pending.pop(0)).logits)

    handle = layer.register_forward_pre_hook(call_again)
    with recorded(vl) as calls:
        found = vl(**outer).logits
    handle.remove()
    lengths = {i["input_ids"].shape[1]: i for i in (inner, outer, text)}
    assert len(calls) == 3 * 14 and len(lengths) == 3
    for call in calls:
        assert_routed([call], true_ids(vl, lengths[call.x.shape[1]]))
    assert close(found, vl(**outer).logits)
    # The innermost call is the first to end.
    assert close(nested[0], vl(**text).logits)
    assert close(nested[1], vl(**inner).logits)


def test_a_nested_call_with_embeddings_does_not_take_the_outer_calls_ids(vl):
    """Of the same shape as the outer call's tokens, it could do so unnoticed."""
    outer = prompts(0)
    shape = (*outer["input_ids"].shape, HIDDEN)
    inner = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ids = 1 - true_ids(vl, outer)
    pending, seen = [inner], []

    def call_again(*_):
        if pending:
            embeds = pending.pop()
            with pytest.raises(RuntimeError, match="the modality of its tokens is not"):
                vl(inputs_embeds=embeds)
            with token_modalities(vl, ids), recorded(vl) as calls:
                vl(inputs_embeds=embeds)
            assert router(vl).call.ids.tolist() == true_ids(vl, outer).tolist()
            seen.extend(calls)

    vl.model.language_model.layers[0].register_forward_pre_hook(call_again)
    wanted = true_ids(vl, outer)
    with recorded(vl) as calls:
        vl(**outer)
    assert_routed(seen, ids, linears=14)
    # The recorder of the outer call saw the inner one, and the refused one's start.
    assert_routed(calls[-14:], wanted, linears=14)


@pytest.mark.parametrize(
    "error, where",
    [
        (RuntimeError, "layers.0.self_attn.k_proj"),
        (KeyboardInterrupt, "layers.1"),
        (GeneratorExit, "norm"),
    ],
)
def test_an_exception_inside_forward_leaves_nothing_behind(vl, error, where):
    def fail(*_):
        assert router(vl).call.known and router(vl).call.ids is not None
        raise error

    module = vl.model.language_model.get_submodule(where)
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(error):
        vl(**prompts(0))
    handle.remove()
    call = router(vl).call
    assert not call.known and call.ids is None
    inputs = batch([BOS, *words(5)])
    with recorded(vl) as calls:
        vl(**inputs)
    assert_routed(calls, true_ids(vl, inputs), linears=14)


def test_a_failing_call_inside_a_block_gives_the_block_back(vl):
    ids = torch.tensor([[1, 0, 1]])
    with token_modalities(vl, ids):
        with pytest.raises(AttributeError):
            vl(input_ids=torch.tensor([[BOS, 11]]), pixel_values="no pixels")
        assert router(vl).call.ids.tolist() == ids.tolist()


def test_inference_mode_and_gradients(vl):
    inputs = prompts(3)
    wanted = vl(**inputs).logits
    with torch.inference_mode():
        assert close(vl(**inputs).logits, wanted)
    assert close(vl(**inputs).logits, wanted)
