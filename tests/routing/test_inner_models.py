# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models whose generate() hands its prompt over to a model inside, as embeddings."""

import copy

import pytest
import torch
import transformers
from linear_oracle import assert_routed, recorded
from refusals import refused
from tiny_models import BOS, HIDDEN, batch, qwen25_vl, router, true_ids, words
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config, token_modalities

OPTIONS = {"scheme": "w4a8", "rounding": "nearest", "alpha": 0.5, "separation": 1.0}
UNKNOWN = "the modality of its tokens is not known"
IMAGE = 5
STEPS = 3


def prompt(seed=0, rows=1, words_=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 48, (rows, 4 + words_), generator=generator)
    ids[:, 1:5] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
    }


def blip2():
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            qformer_config={
                **tower,
                "vocab_size": 48,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 1,
            },
            text_config={
                "model_type": "opt",
                "vocab_size": 48,
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "word_embed_proj_dim": 32,
            },
            num_query_tokens=4,
            image_token_index=IMAGE,
        )
    ).eval()


class RemoteModel(nn.Module):
    """As code that comes with a checkpoint: it embeds, and the rest is the inner one's.

    Attributes:
        hands_over: "generate", to the language model's; "loop", of its own.
    """

    def __init__(self, hands_over="generate"):
        super().__init__()
        torch.manual_seed(1)
        self.hands_over = hands_over
        self.config = transformers.PretrainedConfig(image_token_id=IMAGE)
        self.vision = nn.Linear(3 * 8 * 8, 4 * 32)
        self.language_model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=48,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
        self.eval()

    def get_decoder(self):
        return self.language_model.model

    def embeds(self, input_ids, pixel_values):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        image = (input_ids == IMAGE)[..., None]
        return embeds.masked_scatter(image, 5 * self.vision(pixel_values.flatten(1)))

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
        return self.language_model(
            inputs_embeds=self.embeds(input_ids, pixel_values),
            attention_mask=attention_mask,
        )

    def generate(self, pixel_values, input_ids, attention_mask=None, **options):
        embeds = self.embeds(input_ids, pixel_values)
        if self.hands_over == "generate":
            return self.language_model.generate(
                inputs_embeds=embeds, attention_mask=attention_mask, **options
            )
        found = []
        decoder, head = self.get_decoder(), self.language_model.lm_head
        step = decoder(inputs_embeds=embeds, use_cache=True)
        for _ in range(options["max_new_tokens"]):
            found.append(head(step.last_hidden_state[:, -1:]).argmax(-1))
            step = decoder(input_ids=found[-1], past_key_values=step.past_key_values)
        return torch.cat(found, 1)


MAKERS = {
    "blip2": blip2,
    "remote": RemoteModel,
    "remote, a loop": lambda: RemoteModel("loop"),
}


@pytest.fixture(scope="module")
def inner_models():
    found = {}
    for kind, make in MAKERS.items():
        found[kind] = make()
        data = [prompt(seed) for seed in range(6)]
        recipe = calibrate(found[kind], data, progress=False, **OPTIONS)
        quantize_(found[kind], masquant_config(recipe))
    return found


@pytest.fixture(params=MAKERS)
def model(inner_models, request):
    return copy.deepcopy(inner_models[request.param])


@pytest.fixture
def remote(inner_models):
    return copy.deepcopy(inner_models["remote"])


def ids_of(inputs):
    return (inputs["input_ids"] == IMAGE).long()


def greedy(**options):
    return {
        "max_new_tokens": STEPS,
        "min_new_tokens": STEPS,
        "do_sample": False,
        "pad_token_id": 0,
        "suppress_tokens": [IMAGE],
        **options,
    }


def assert_prefill_and_steps(calls, ids):
    """Embeddings of the whole prompt, then one token of text at a time."""
    prefill = [c for c in calls if c.x.shape[:-1].numel() == ids.numel()]
    steps = [c for c in calls if c.x.shape[:-1].numel() == ids.shape[0]]
    assert prefill and steps and len(prefill) + len(steps) == len(calls)
    assert len(steps) >= (STEPS - 1) * len(prefill)
    assert_routed(prefill, ids)
    assert_routed(steps, torch.zeros(ids.shape[0], 1, dtype=torch.int64))


def test_the_prompt_reaches_the_inner_model(model):
    inputs = prompt(7, rows=2)
    with recorded(model) as calls:
        model.generate(**inputs, **greedy())
    assert_prefill_and_steps(calls, ids_of(inputs))
    assert not router(model).call.known and router(model).call.prompts == ()


def test_the_way_out_that_the_message_advises(model):
    """Given the embeddings alone, nobody knows the tokens, until somebody says."""
    inputs, inner = prompt(3), model.language_model
    embeds = inner.get_input_embeddings()(inputs["input_ids"])
    options = greedy(attention_mask=inputs["attention_mask"])
    with refused(UNKNOWN, RuntimeError):
        inner.generate(inputs_embeds=embeds, **options)
    with token_modalities(model, ids_of(inputs)), recorded(model) as calls:
        inner.generate(inputs_embeds=embeds, **options)
    assert_prefill_and_steps(calls, ids_of(inputs))
    with token_modalities(model, ids_of(inputs)), recorded(model) as calls:
        model.generate(**inputs, **greedy())
    assert_prefill_and_steps(calls, ids_of(inputs))


@pytest.mark.parametrize("kind", ["blip2", "remote"])
@pytest.mark.parametrize(
    "options, declared",
    [
        ({"num_beams": 2}, False),
        ({"num_beams": 2}, True),
        ({"do_sample": True, "num_return_sequences": 2}, False),
    ],
    ids=["beams", "beams of embeddings", "sampling"],
)
def test_rows_that_generate_repeats(inner_models, kind, options, declared):
    model = copy.deepcopy(inner_models[kind])
    inputs = prompt(5, rows=2)
    ids = ids_of(inputs)
    with recorded(model) as calls:
        if declared:
            embeds = model.language_model.get_input_embeddings()(inputs["input_ids"])
            with token_modalities(model, ids):
                model.language_model.generate(inputs_embeds=embeds, **greedy(**options))
        else:
            model.generate(**inputs, **greedy(**options))
    assert_prefill_and_steps(calls, ids.repeat_interleave(2, 0))


def test_rows_that_are_no_repeats_are_not_known(remote):
    """As many as for two beams, but the second row is another one."""
    inputs = prompt(1)
    embeds = remote.embeds(**{k: inputs[k] for k in ("input_ids", "pixel_values")})
    del inputs["attention_mask"]
    remote.embeds = lambda *_: torch.cat([embeds, embeds.flip(1)])
    with refused(UNKNOWN, RuntimeError):
        remote.generate(**inputs, **greedy())
    remote.embeds = lambda *_: torch.cat([embeds, embeds])
    with recorded(remote) as calls:
        remote.generate(**inputs, **greedy())
    assert_prefill_and_steps(calls, ids_of(inputs).repeat(2, 1))


def test_a_generate_of_the_instance(model):
    """Put on before the model was routed, and after."""
    inputs = prompt(7)
    for _ in range(2):
        old = model.generate
        model.generate = lambda *args, _old=old, **options: _old(*args, **options)
        with recorded(model) as calls:
            model.generate(**inputs, **greedy())
        assert_prefill_and_steps(calls, ids_of(inputs))
        its = router(model)
        its.detach(model)
        its.attach(model)


def test_padding_on_the_left_is_of_the_base(model):
    inputs = prompt(4, rows=2)
    inputs["attention_mask"][1, :2] = 0
    wanted = ids_of(inputs) * inputs["attention_mask"]
    with recorded(model) as calls:
        model.generate(**inputs, **greedy())
    assert_prefill_and_steps(calls, wanted)


@pytest.mark.parametrize("kind", ["remote", "remote, a loop"])
def test_embeddings_of_other_tokens_than_the_prompts(inner_models, kind):
    """One more than there are input_ids, as where soft prompts are put in front."""
    model = copy.deepcopy(inner_models[kind])
    inputs = prompt(2)
    del inputs["attention_mask"]
    embeds = model.language_model.get_input_embeddings()(inputs["input_ids"])
    longer = torch.cat([embeds[:, :1], embeds], 1)
    ids = torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids_of(inputs)], 1)
    model.embeds = lambda *_: longer
    with refused(UNKNOWN, RuntimeError):
        model.generate(**inputs, **greedy())
    with token_modalities(model, ids), recorded(model) as calls:
        model.generate(**inputs, **greedy())
    assert_prefill_and_steps(calls, ids)


def test_the_inner_model_is_called_with_input_ids_of_its_own(model):
    tokens = torch.tensor([[BOS, 11, IMAGE, 12]])
    with recorded(model) as calls:
        model.language_model(input_ids=tokens)
    assert_routed(calls, (tokens == IMAGE).long())
    with recorded(model) as calls:
        model.language_model.generate(tokens, **greedy())
    assert_prefill_and_steps(calls, (tokens == IMAGE).long())


def test_input_ids_that_are_fewer_than_the_tokens_give_way_to_a_block(remote):
    """A model that makes many tokens of one placeholder inside its forward."""
    model = remote
    short = torch.tensor([[BOS, IMAGE, 11]])
    full = torch.tensor([[BOS, *[IMAGE] * 4, 11]])
    pixels = prompt()["pixel_values"]
    embeds = model.embeds(full, pixels)
    model.embeds = lambda *_: embeds
    ids = (full == IMAGE).long()
    with pytest.raises(ValueError, match="does not match the modality ids of the call"):
        model(input_ids=short, pixel_values=pixels)
    with token_modalities(model, ids), recorded(model) as calls:
        model(input_ids=short, pixel_values=pixels)
    assert_routed(calls, ids)


def test_a_caption_without_a_prompt(inner_models):
    """BLIP-2 makes input_ids of its own inside generate()."""
    model = copy.deepcopy(inner_models["blip2"])
    model.config.text_config.bos_token_id = BOS
    with recorded(model) as calls:
        model.generate(pixel_values=prompt()["pixel_values"], **greedy())
    assert_prefill_and_steps(calls, torch.tensor([[1, 1, 1, 1, 0]]))


def test_an_assistant_and_chunks(vl):
    inputs = batch([BOS, *words(3), "image", 11])
    plain = qwen25_vl(seed=3)
    with recorded(vl) as calls:
        vl.generate(**inputs, **greedy(assistant_model=plain))
    prefill = [c for c in calls if c.x.shape[1] >= inputs["input_ids"].shape[1]]
    ids = true_ids(vl, inputs)
    for call in prefill:
        more = torch.zeros(1, call.x.shape[1] - ids.shape[1], dtype=torch.int64)
        assert_routed([call], torch.cat([ids, more], 1))
    for call in calls:
        if call.x.shape[1] < ids.shape[1]:
            assert_routed([call], torch.zeros(call.x.shape[:2], dtype=torch.int64))


def test_generate_with_both_input_ids_and_embeddings(vl):
    inputs = batch([BOS, *words(3), "image", 11])
    ids = true_ids(vl, inputs)
    embeds = torch.randn(*ids.shape, HIDDEN, generator=torch.Generator().manual_seed(0))
    with recorded(vl) as calls:
        vl.generate(inputs["input_ids"], inputs_embeds=embeds, **greedy())
    assert_prefill_and_steps(calls, ids)
