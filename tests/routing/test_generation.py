# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""generate(): the prefill is mixed, every step after it is of the base modality."""

import pytest
import torch
from linear_oracle import assert_routed, recorded
from tiny_models import BOS, IMAGE, batch, router, true_ids, words

NO_PLACEHOLDERS = list(range(10))
STEPS = 4
OPTIONS = {
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "suppress_tokens": NO_PLACEHOLDERS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def mixed_batch(audio: bool):
    """Rows of different lengths, so padded on the left, and of different modalities."""
    sound = ["audio"] if audio else ["video"]
    return batch(
        [BOS, *words(3), "image", 11],
        [BOS, 12, *sound, "small image"],
        [BOS, *words(2)],
        seed=6,
        audio=audio,
    )


def prefill_and_steps(model, calls, rows):
    """The calls of the prefill, and whether every later one was right."""
    lengths = [c.x.shape[1] for c in calls]
    prefill = [c for c in calls if c.x.shape[1] > 1]
    steps = [c for c in calls if c.x.shape[1] == 1]
    assert len(prefill) == 14 and len(steps) == 14 * (STEPS - 1), lengths
    assert_routed(steps, torch.zeros(rows, 1, dtype=torch.int64))
    assert not router(model).call.known
    return prefill


@pytest.mark.parametrize(
    "kind, options",
    [
        pytest.param("vl", {}, id="greedy"),
        pytest.param("omni", {}, id="greedy, with sounds"),
        pytest.param("omni", {"num_beams": 3}, id="beams"),
        pytest.param(
            "vl",
            {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
            id="sampling",
        ),
        pytest.param(
            "omni",
            {"cache_implementation": "static", "disable_compile": True},
            id="static cache",
        ),
    ],
)
def test_generate(kind, options, request):
    model = request.getfixturevalue(kind)
    inputs = mixed_batch(kind == "omni")
    assert (inputs["attention_mask"] == 0).any()
    torch.manual_seed(0)
    with recorded(model) as calls:
        out = model.generate(**inputs, **{**OPTIONS, **options})
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    ids = true_ids(model, inputs).repeat_interleave(copies, 0)
    prefill = prefill_and_steps(model, calls, ids.shape[0])
    assert_routed(prefill, ids)
    # int8 rounding may flip where the attention of another cache sums in another order.
    logits = model(**inputs).logits[:, -1].repeat_interleave(copies, 0)
    torch.testing.assert_close(out.logits[0], logits, rtol=0, atol=0.1)
    if not options:
        torch.testing.assert_close(out.logits[0], logits, rtol=0, atol=1e-5)


def test_prefill_in_chunks_through_the_middle_of_an_image(vl):
    """Chunks of three tokens: a chunk may be all image, one may be one image token."""
    inputs = batch([BOS, 11, 12, "image", 13, 14, 15])
    ids = true_ids(vl, inputs)
    assert ids.shape[1] == 12 and ids[0, 4:8].tolist() == [1] * 4
    chunks = list(ids.split(3, dim=1))
    with recorded(vl) as calls:
        vl.generate(**inputs, **{**OPTIONS, "prefill_chunk_size": 3})
    prefill = [c for c in calls if c.x.shape[1] == 3]
    assert len(prefill) == 4 * 14
    for index, chunk in enumerate(chunks):
        assert_routed(prefill[14 * index : 14 * index + 14], chunk)


def test_a_conversation_goes_on_with_another_image(vl):
    """A second prompt on top of a cache: its mask is longer than its input_ids."""
    first = batch([BOS, 11, "image"])
    second = batch(["small image", 12, 13], seed=2)
    cache = vl(**first, use_cache=True).past_key_values
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    mask = torch.ones(1, length, dtype=torch.long)
    with recorded(vl) as calls:
        vl(**{**second, "attention_mask": mask}, past_key_values=cache)
    assert_routed(calls, true_ids(vl, {"input_ids": second["input_ids"]}), linears=14)


def test_a_generated_placeholder_is_routed_by_its_token(vl):
    """A model may say the image token: it is embedded as such, and routed as such."""
    with recorded(vl) as calls:
        vl.generate(
            **batch([BOS, 11]),
            **{**OPTIONS, "suppress_tokens": [t for t in range(48) if t != IMAGE]},
        )
    steps = [c for c in calls if c.x.shape[1] == 1]
    assert_routed(steps, torch.ones(1, 1, dtype=torch.int64), linears=14 * (STEPS - 1))
