# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Saying of which modality tokens are, where input_ids do not."""

import pytest
import torch
from linear_oracle import assert_routed, linears_of, literal, misrouted, recorded
from tiny_models import (
    BOS,
    HIDDEN,
    IMAGE,
    PlainModel,
    batch,
    qwen25_vl,
    router,
    true_ids,
    words,
)

from torchao_masquant import token_modalities

IDS = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 0, 0, 1]])


def plain_input(seed: int = 5) -> torch.Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))


def embeds(seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, HIDDEN, generator=generator)


def test_the_oracle_sees_a_misrouted_token(plain):
    with token_modalities(plain, IDS), recorded(plain) as calls:
        plain(plain_input())
    assert_routed(calls, IDS, linears=2)
    for wrong in (IDS.flip(0), IDS.flip(1), torch.zeros_like(IDS), (IDS + 1) % 3):
        for call in calls:
            found = misrouted(call, wrong)
            assert found.tolist() == (wrong != IDS).reshape(-1).tolist()


def test_any_integers_will_do(plain):
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        with token_modalities(plain, IDS.to(dtype)), recorded(plain) as calls:
            plain(plain_input())
        assert_routed(calls, IDS, linears=2)


def test_all_base(plain):
    for ids in (None, torch.zeros_like(IDS)):
        with token_modalities(plain, ids), recorded(plain) as calls:
            assert router(plain).call.ids is None
            plain(plain_input())
        assert_routed(calls, torch.zeros_like(IDS), linears=2)


def test_one_linear_by_itself(plain):
    for x, ids in (
        (plain_input()[0], IDS[0]),
        (plain_input(), IDS),
        (plain_input()[0, 0], torch.tensor(2)),
        (plain_input().reshape(1, 2, 5, 16), IDS[None]),
        (torch.randn(0, 16), torch.zeros(0, dtype=torch.int64)),
    ):
        with token_modalities(plain.first, ids), recorded(plain.first) as calls:
            plain.first(x)
        assert_routed(calls, ids, linears=1)


def test_tokens_of_a_batch_may_be_flattened(plain):
    with token_modalities(plain, IDS), recorded(plain) as calls:
        plain(plain_input().reshape(10, 16))
    assert_routed(calls, IDS, linears=2)


def test_parts_of_a_model(vl):
    ids = IDS.clamp(max=1)
    language_model = vl.model.language_model
    for part in (language_model, vl.model):
        with token_modalities(part, ids), recorded(part) as calls:
            part(inputs_embeds=embeds())
        assert_routed(calls, ids, linears=14)
    layer = language_model.layers[1]
    positions = torch.arange(5).expand(3, 2, 5)
    rotary = language_model.rotary_emb(embeds(), positions)
    with token_modalities(layer, ids), recorded(layer) as calls:
        layer(embeds(), position_embeddings=rotary)
    assert_routed(calls, ids, linears=7)


def refused_at_once(model, ids, message, error):
    with pytest.raises(error, match=literal(message)):
        with token_modalities(model, ids):
            raise AssertionError("not to be reached")
    assert not router(model).call.known


def test_ids_that_are_no_integers(plain):
    message = "modality ids are integers that index ('text', 'vision', 'audio')"
    others = IDS.float(), IDS.to(torch.complex64), IDS.bool()
    for ids in (*others, [[0, 1]], (0, 1), 1):
        refused_at_once(plain, ids, message, TypeError)


def test_ids_out_of_range(plain):
    for token, span in ((3, "0..3"), (-1, "-1..2"), (-2, "-2..2")):
        ids = IDS.clone()
        ids[1, 3] = token
        message = (
            "modality ids index ('text', 'vision', 'audio'), so they lie in 0..2, got "
            f"{span}."
        )
        refused_at_once(plain, ids, message, ValueError)


def test_ids_of_another_shape(plain):
    for ids, x in (
        (IDS, plain_input()[:, :4]),
        (IDS[:1], plain_input()),
        (IDS.t(), plain_input()),
        (IDS.reshape(-1), plain_input()),
        (IDS, plain_input().reshape(10, 16)[:9]),
        (IDS, plain_input().reshape(1, 10, 16)),
    ):
        message = (
            f"first: input of shape {tuple(x.shape)} does not match the modality ids of "
            f"the call, of shape {tuple(ids.shape)}."
        )
        with pytest.raises(ValueError, match=literal(message)):
            with token_modalities(plain, ids):
                plain(x)
        assert not router(plain).call.known


def test_blocks_nest(plain):
    call = router(plain).call
    other = (IDS + 1) % 3
    with recorded(plain) as calls:
        with token_modalities(plain, IDS):
            plain(plain_input())
            with token_modalities(plain, other):
                plain(plain_input())
                with token_modalities(plain.second, None):
                    plain(plain_input())
                plain(plain_input())
            plain(plain_input())
        assert not call.known and call.ids is None
    for index, ids in enumerate((IDS, other, torch.zeros_like(IDS), other, IDS)):
        assert_routed(calls[2 * index : 2 * index + 2], ids, linears=2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_a_block_ends_it(plain, error):
    with pytest.raises(error):
        with token_modalities(plain, IDS):
            with pytest.raises(error):
                with token_modalities(plain, None):
                    raise error
            assert router(plain).call.ids.tolist() == IDS.tolist()
            raise error
    assert not router(plain).call.known
    with pytest.raises(RuntimeError, match="the modality of its tokens is not known"):
        plain(plain_input())


@pytest.mark.parametrize("make", [qwen25_vl, PlainModel])
def test_an_unquantized_model(make):
    with pytest.raises(ValueError, match="has no quantized linear to tell its tokens'"):
        with token_modalities(make(), None):
            raise AssertionError("not to be reached")


def test_a_part_without_quantized_linears(vl):
    with pytest.raises(ValueError, match="has no quantized linear to tell"):
        with token_modalities(vl.model.visual, None):
            raise AssertionError("not to be reached")


def test_no_block_and_no_input_ids(vl, plain):
    name = "model.language_model.layers.0.self_attn.q_proj"
    message = (
        f"{name}: the modality of its tokens is not known, since the call did not go "
        "through the model with input_ids; wrap it in "
        "torchao_masquant.token_modalities(model, ids)."
    )
    for call in (vl, vl.model, vl.model.language_model):
        with pytest.raises(RuntimeError, match=literal(message)):
            call(inputs_embeds=embeds())
    # The inner model is not the one that is routed, also with input_ids.
    with pytest.raises(RuntimeError, match=literal(message)):
        vl.model(input_ids=torch.tensor([[BOS, 11]]))
    with pytest.raises(RuntimeError, match="^second: the modality"):
        plain.second(torch.randn(1, 24))


def test_input_ids_inside_a_block_are_what_counts(vl):
    inputs = batch([BOS, "image", 11], [BOS, 12])
    wrong = torch.ones_like(inputs["input_ids"])
    with token_modalities(vl, wrong), recorded(vl) as calls:
        vl(**inputs)
        assert router(vl).call.ids.tolist() == wrong.tolist()
    assert_routed(calls, true_ids(vl, inputs), linears=14)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_from_embeddings(vl, beams):
    ids = torch.tensor([[0, 1, 1, 0, 0]])
    seen = []
    first = next(iter(linears_of(vl).values()))
    first.register_forward_pre_hook(
        lambda *_: seen.append((router(vl).call.known, router(vl).call.ids))
    )
    with token_modalities(vl, ids.repeat(beams, 1)):
        out = vl.generate(
            inputs_embeds=embeds()[:1],
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            max_new_tokens=4,
            min_new_tokens=4,
            num_beams=beams,
            do_sample=False,
            suppress_tokens=list(range(10)),
        )
    assert out.shape == (1, 4)
    assert len(seen) == 4 and all(known for known, _ in seen)
    assert seen[0][1].tolist() == ids.repeat(beams, 1).tolist()
    assert all(ids is None for _, ids in seen[1:])
    assert not router(vl).call.known


def test_embeddings_route_like_the_input_ids_that_they_come_from(vl):
    inputs = batch(
        [BOS, *words(3), "image", 11], [BOS, *words(2), "small image", "video"]
    )
    captured = {}

    def keep(_, args, kwargs):
        captured.update(kwargs)

    handle = vl.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    wanted = vl(**inputs).logits
    handle.remove()
    with token_modalities(vl, true_ids(vl, inputs)):
        found = vl(
            inputs_embeds=captured["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            position_ids=captured["position_ids"],
        ).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert IMAGE in inputs["input_ids"]
