# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From a config to placeholder tokens, and from input_ids to modality ids."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import ids_by_hand
from refusals import refused
from tiny_models import AUDIO, IMAGE, VIDEO, PlainModel, omni_thinker, qwen25_vl
from transformers import Qwen2_5OmniConfig, Qwen2Config

from torchao_masquant import Router
from torchao_masquant.modality import modality_token_ids

TOKEN_IDS = {"text": (), "vision": (IMAGE, VIDEO), "audio": (AUDIO,)}
NAMES = {IMAGE: "vision", VIDEO: "vision", AUDIO: "audio"}


def test_every_name_of_a_placeholder():
    kinds = {"image": "vision", "video": "vision", "audio": "audio"}
    for kind, suffix in itertools.product(kinds, ("id", "index")):
        inner = SimpleNamespace(**{f"{kind}_token_{suffix}": 17})
        for config in (
            inner,
            SimpleNamespace(thinker_config=inner),
            SimpleNamespace(text_config=inner),
        ):
            found = modality_token_ids(config)
            assert found == {"text": (), kinds[kind]: (17,)}, config


def test_placeholders_two_levels_down():
    inner = SimpleNamespace(audio_token_id=3)
    config = SimpleNamespace(
        image_token_id=9,
        video_token_id=4,
        thinker_config=SimpleNamespace(text_config=inner),
    )
    found = modality_token_ids(config)
    assert found == {"text": (), "vision": (4, 9), "audio": (3,)}
    assert list(found) == ["text", "vision", "audio"]


def test_one_token_for_image_and_video_is_no_conflict():
    config = SimpleNamespace(image_token_id=9, video_token_id=9)
    assert modality_token_ids(config) == {"text": (), "vision": (9,)}


def test_which_values_are_tokens():
    for absent in (None, -1, "<image>", [5]):
        config = SimpleNamespace(image_token_id=absent)
        assert modality_token_ids(config) == {"text": ()}
    assert modality_token_ids(SimpleNamespace(audio_token_id=0))["audio"] == (0,)


def test_a_config_that_holds_itself():
    config = SimpleNamespace(image_token_id=1)
    config.text_config = config
    assert modality_token_ids(config) == {"text": (), "vision": (1,)}


def test_a_token_marked_twice_is_refused():
    other = SimpleNamespace(audio_token_id=7)
    for config in (
        SimpleNamespace(image_token_id=7, text_config=other),
        SimpleNamespace(image_token_id=7, audio_token_id=7),
    ):
        with refused("token id 7 as both vision and audio; give each modality"):
            modality_token_ids(config)


def test_transformers_configs():
    vision = {"text": (), "vision": (IMAGE, VIDEO)}
    assert modality_token_ids(qwen25_vl().config) == vision
    thinker = omni_thinker().config
    assert modality_token_ids(thinker) == {**vision, "audio": (AUDIO,)}
    whole = Qwen2_5OmniConfig(thinker_config=thinker.to_dict())
    assert modality_token_ids(whole) == {**vision, "audio": (AUDIO,)}
    assert modality_token_ids(Qwen2Config()) == {"text": ()}


def test_router_for_a_text_only_config_has_nothing_to_route():
    model = SimpleNamespace(config=Qwen2Config())
    assert Router.for_model(model).modalities == ("text",)
    assert Router.for_model(model).is_complete


def test_router_refuses_a_modality_that_the_config_does_not_declare():
    with pytest.raises(ValueError, match=r"declares the modalities \('text', 'vision'"):
        Router.for_model(qwen25_vl(), ("text", "audio"))


def test_router_refuses_names_that_tell_nothing_apart():
    for names in ((), ("text", "text")):
        with pytest.raises(ValueError, match="distinct names of modalities, base fir"):
            Router(names)


def test_router_without_a_config_takes_any_names():
    router = Router.for_model(PlainModel(), ("calm", "storm"))
    assert router.modalities == ("calm", "storm")
    assert router.token_ids is None


def test_a_router_does_not_share_its_table_with_its_maker():
    table = {"text": [], "vision": [IMAGE]}
    router = Router(("text", "vision"), table)
    table["vision"].append(11)
    assert router.ids_of(torch.tensor([[11]])) is None


TOKENS = st.sampled_from([IMAGE, VIDEO, AUDIO, 0, 11, 12, 40])


@st.composite
def calls(draw):
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 7))
    token = draw(st.sampled_from([TOKENS, st.sampled_from([11, 12])]))
    row = st.lists(token, min_size=length, max_size=length)
    mask_row = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids = [draw(row) for _ in range(rows)]
    mask = [draw(mask_row) for _ in range(rows)] if draw(st.booleans()) else None
    shape = (rows, length)
    return (
        torch.tensor(
            ids, dtype=draw(st.sampled_from([torch.int64, torch.int32]))
        ).reshape(shape),
        None
        if mask is None
        else torch.tensor(
            mask, dtype=draw(st.sampled_from([torch.int64, torch.bool, torch.float32]))
        ).reshape(shape),
    )


@settings(max_examples=150, deadline=None)
@given(
    call=calls(),
    order=st.permutations(["text", "vision", "audio"]),
    skip_padding=st.booleans(),
)
def test_ids_are_those_of_a_plain_loop(call, order, skip_padding):
    input_ids, mask = call
    router = Router(order, TOKEN_IDS, skip_padding=skip_padding)
    found = router.ids_of(input_ids, mask)
    padding = -2 if skip_padding else 0
    wanted = ids_by_hand(order, NAMES, input_ids, mask, padding)
    if (wanted == 0).all():
        assert found is None
    else:
        assert found.dtype == torch.int64
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 3, 3),
        torch.zeros(2, 5),
        torch.zeros(3, 2),
        torch.zeros(6),
        {"full_attention": torch.zeros(2, 1, 3, 3), "sliding_attention": None},
        {},
    ],
    ids=["4-D", "longer", "transposed", "flat", "dict", "empty dict"],
)
def test_a_mask_that_is_not_of_the_tokens_shape_is_not_looked_at(mask):
    router = Router(("text", "vision", "audio"), TOKEN_IDS)
    input_ids = torch.tensor([[IMAGE, 11, AUDIO], [12, 11, VIDEO]])
    assert router.ids_of(input_ids, mask).tolist() == [[1, 0, 2], [0, 0, 1]]


@pytest.mark.parametrize(
    "modalities, input_ids",
    [
        (("text", "vision"), [[11, AUDIO]]),
        (("text",), [[11, IMAGE]]),
        (("vision", "audio"), [[IMAGE, 11]]),
    ],
)
def test_a_token_of_a_modality_without_recipe_raises(modalities, input_ids):
    router = Router(modalities, TOKEN_IDS)
    missing = [m for m in TOKEN_IDS if m not in modalities]
    with pytest.raises(
        ValueError,
        match=f"the call has {' or '.join(missing)} tokens, but the model was quantized",
    ):
        router.ids_of(torch.tensor(input_ids))
    # Where it is padding, it does not matter.
    mask = torch.tensor([[t in (11, IMAGE) for t in row] for row in input_ids])
    if modalities == ("text", "vision"):
        assert router.ids_of(torch.tensor(input_ids), mask) is None


def test_the_oracle_counts_as_it_should():
    ids = ids_by_hand(
        ("audio", "text", "vision"),
        NAMES,
        torch.tensor([[IMAGE, 11, AUDIO, VIDEO]]),
        torch.tensor([[1, 1, 1, 0]]),
        padding=-2,
    )
    assert ids.tolist() == [[2, 1, 0, -2]]
