# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""transformers' continuous batching: requests packed into one sequence, on a thread."""

import contextlib

import pytest
import torch
from linear_oracle import assert_routed, recorded
from tiny_models import AUDIO, BOS, IMAGE, batch, router, true_ids
from transformers import ContinuousBatchingConfig, GenerationConfig

STEPS = 4
PROMPTS = [[BOS, 11, 12, 13], [BOS, 14], [BOS, 15, 16, 17, 18, 19], [BOS, 20, 21]]
GREEDY = GenerationConfig(
    max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0
)


def small(**options):
    """A cache of a few pages."""
    return ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32, **options)


@contextlib.contextmanager
def batches_of(model):
    """The packed token ids of every batch."""
    seen = []
    hook = model.register_forward_pre_hook(
        # The batches share their memory.
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


def assert_batches_routed(model, batches, calls):
    assert len(calls) == 14 * len(batches)
    for at, tokens in enumerate(batches):
        ids = true_ids(model, {"input_ids": tokens.to(torch.int64)})
        assert_routed(calls[14 * at : 14 * at + 14], ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_token_of_packed_requests_is_routed(omni, attention):
    omni.set_attn_implementation(attention)
    with batches_of(omni) as batches, recorded(omni) as calls:
        outputs = omni.generate_batch(
            PROMPTS, generation_config=GREEDY, continuous_batching_config=small()
        )
    found = list(outputs.values())
    assert [len(o.generated_tokens) for o in found] == [STEPS] * len(PROMPTS)
    assert not any(o.error for o in found)
    assert batches[0].shape == (1, sum(map(len, PROMPTS)))
    assert_batches_routed(omni, batches, calls)
    assert not router(omni).call.known


def test_placeholders_are_routed_wherever_they_are_packed(omni):
    """Also where a prompt is cut into two batches in the middle of an image."""
    prompts = [
        [BOS, 11],
        [BOS, *[IMAGE] * 20, 12],
        [BOS, AUDIO, AUDIO, 13],
        [BOS, *[IMAGE] * 18],
    ]
    with batches_of(omni) as batches, recorded(omni) as calls:
        outputs = omni.generate_batch(
            prompts, generation_config=GREEDY, continuous_batching_config=small()
        )
    # Beside the rest of the last prompt the second batch holds what the others said first,
    # which in a model of random weights may be this token, too.
    said = [
        o.generated_tokens[0] for o in outputs.values() if o.prompt_ids != prompts[3]
    ]
    assert len(said) == 3
    images = 38 + said.count(IMAGE)
    assert sum((tokens == IMAGE).sum() for tokens in batches[:2]) == images
    assert all((tokens == IMAGE).any() for tokens in batches[:2])
    assert_batches_routed(omni, batches, calls)


def test_requests_that_come_while_others_decode(omni):
    with batches_of(omni) as batches, recorded(omni) as calls:
        with omni.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=small()
        ) as manager:
            first = manager.add_request(PROMPTS[0], max_new_tokens=60, streaming=True)
            assert manager.get_result(first, timeout=60) is not None
            manager.add_request([BOS, IMAGE, IMAGE], max_new_tokens=2)
            # The loop's calls are its thread's.
            assert not router(omni).call.known
    # One batch held a decoding request's token and a new prompt.
    assert any(t.shape[1] == 4 and (t == IMAGE).sum() == 2 for t in batches)
    assert_batches_routed(omni, batches, calls)


def test_a_call_with_an_image_while_the_loop_pauses(omni):
    """A loop that runs makes transformers 5.24 set the shared config not causal."""
    inputs = batch([BOS, 11, "image", 12], audio=True)
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}
    wanted = omni.generate(**inputs, **options)
    with omni.continuous_batching_context_manager(
        generation_config=GREEDY, continuous_batching_config=small()
    ) as manager:
        request = manager.add_request(PROMPTS[0], max_new_tokens=60, streaming=True)
        assert manager.get_result(request, timeout=60) is not None
        with manager.pause():
            assert torch.equal(omni.generate(**inputs, **options), wanted)
        while not manager.get_result(request, timeout=60).is_finished():
            pass


def test_a_failing_batch_leaves_nothing_behind(vl):
    def fail(*_):
        raise RuntimeError("no such layer today")

    layer = vl.model.language_model.layers[1]
    hook = layer.register_forward_pre_hook(fail)
    outputs = vl.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=small()
    )
    hook.remove()
    assert all("no such layer today" in o.error for o in outputs.values())
    outputs = vl.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=small()
    )
    assert len(outputs) == len(PROMPTS) and not any(o.error for o in outputs.values())
