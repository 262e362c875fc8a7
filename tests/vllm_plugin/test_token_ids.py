# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a token of vLLM's step is: by its id, and by whether a tower made it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchao_masquant.vllm_plugin.token_ids import TokenIds, watch_embedding

IMAGE, VIDEO, SOUND = 5, 6, 9
PLACEHOLDERS = {"text": (), "vision": (IMAGE, VIDEO), "audio": (SOUND,)}


def token_ids(size: int = 8, modalities=("text", "vision", "audio")) -> TokenIds:
    return TokenIds(size, modalities, PLACEHOLDERS, torch.device("cpu"))


def filled(ids: TokenIds, tokens: list[int], made: list[bool] | None) -> list[int]:
    mask = None if made is None else torch.tensor(made)
    ids.fill(torch.tensor(tokens), mask)
    return ids.ids.tolist()


def test_placeholders_that_towers_fill_are_of_their_modality():
    found = filled(
        token_ids(), [1, IMAGE, VIDEO, SOUND, 400], [False, True, True, True, False]
    )
    assert found == [0, 1, 1, 2, 0, 0, 0, 0]


def test_a_placeholder_that_somebody_typed_is_text():
    assert filled(token_ids(4), [IMAGE, IMAGE], [False, True]) == [0, 1, 0, 0]


def test_a_token_of_an_image_that_is_no_placeholder_is_text():
    assert filled(token_ids(4), [3, IMAGE, 7], [True, True, True]) == [0, 1, 0, 0]


@pytest.mark.parametrize("mask", [None, [False, False]])
def test_a_step_that_only_decodes_leaves_nothing_of_the_one_before(mask):
    ids = token_ids(4)
    filled(ids, [SOUND] * 4, [True] * 4)
    assert filled(ids, [1, 2], mask) == [0, 0, 0, 0]


def test_text_need_not_be_the_base():
    ids = token_ids(4, ("vision", "text", "audio"))
    assert ids.ids.tolist() == [1, 1, 1, 1]
    assert filled(ids, [IMAGE, 1, SOUND], [True, False, True]) == [0, 1, 2, 1]


def test_graphs_keep_the_address():
    ids = token_ids(4)
    address = ids.ids.data_ptr()
    filled(ids, [IMAGE] * 3, [True] * 3)
    filled(ids, [1], None)
    assert ids.ids.data_ptr() == address and ids.ids.dtype == torch.int32


_TOKEN = st.sampled_from([0, 1, IMAGE, VIDEO, SOUND, SOUND + 1, 150_000])
_STEP = st.lists(st.tuples(_TOKEN, st.booleans()), min_size=1, max_size=8)


@given(st.lists(_STEP, min_size=1, max_size=5))
def test_any_sequence_of_steps(steps):
    ids = token_ids()
    of = {t: m for m, known in enumerate(PLACEHOLDERS.values()) for t in known}
    for step in steps:
        tokens, made = [t for t, _ in step], [m for _, m in step]
        expected = [of.get(t, 0) if m else 0 for t, m in step]
        assert filled(ids, tokens, made) == expected + [0] * (8 - len(step))


class Model(nn.Module):
    """As vLLM's multimodal models embed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        token_ids().hold_in(self.layer)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal):
        return input_ids, multimodal_embeddings, is_multimodal


def test_a_model_fills_the_ids_that_its_layers_read():
    watch_embedding(Model)
    watch_embedding(Model)
    first, second = Model(), Model()
    tokens, mask = torch.tensor([1, SOUND]), torch.tensor([False, True])
    assert first.embed_input_ids(tokens, "made", is_multimodal=mask) == (
        tokens,
        "made",
        mask,
    )
    assert first.layer.masquant_token_ids.ids.tolist()[:2] == [0, 2]
    assert second.layer.masquant_token_ids.ids.tolist()[:2] == [0, 0]


def test_they_come_back_with_the_buffers_of_their_model():
    """As vLLM's sleep has it: all else on a device is lost."""
    model = Model()
    ids = model.layer.masquant_token_ids
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for value in vars(ids).values():
        if isinstance(value, torch.Tensor):
            value.fill_(99)
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    assert filled(ids, [1, SOUND], [False, True]) == [0, 2, 0, 0, 0, 0, 0, 0]


def test_a_model_that_does_not_embed_is_refused():
    with pytest.raises(TypeError, match="Linear does not embed tokens"):
        watch_embedding(nn.Linear)
