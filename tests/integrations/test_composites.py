# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models whose decoder lies deeper than ``get_decoder()`` tells."""

import copy
import re
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from checkpoints import assert_same_files
from tiny_models import OMNI_DECODER
from torch import nn
from torchao.quantization import quantize_
from whole_omni import SPEAKERS, save_as_on_the_hub, whole_omni

from torchao_masquant import (
    MASQuantHfConfig,
    MASQuantLinear,
    calibrate,
    masquant_config,
    save_quantized,
)
from torchao_masquant.calibration.sensitivity import modality_sensitivity
from torchao_masquant.evaluation import evaluate
from torchao_masquant.models.parts import token_reader
from torchao_masquant.selection import decoder_of, select
from torchao_masquant.sequential import calibrate_sequential

FAST = {"alpha": 0.5, "separation": 1.0, "rank": 2, "progress": False}
SAMPLES = tiny_models.samples(audio=True)
PROMPT = tiny_models.batch([1, 11, "image", 12, "audio", 13, 14], audio=True)
DECODER = f"thinker.{OMNI_DECODER}.layers."


def quantized_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, MASQuantLinear)]


@torch.no_grad()
def words(model: Any) -> list[int]:
    """What a whole model writes."""
    found = model.generate(
        **PROMPT,
        generation_mode="text",
        thinker_max_new_tokens=6,
        thinker_do_sample=False,
    )
    return found[0, -6:].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_as_on_the_hub(whole_omni(), tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def whole():
    """Calibrated and quantized as a whole; and the same by its thinker alone."""
    model = whole_omni()
    recipe = calibrate(model, SAMPLES, **FAST)
    thinker = calibrate(model.thinker, SAMPLES, **FAST)
    assert {
        n.removeprefix("thinker."): x.fingerprint for n, x in recipe.layers.items()
    } == {n: x.fingerprint for n, x in thinker.layers.items()}
    quantize_(model.thinker, masquant_config(thinker))
    expected = words(model)
    model = whole_omni()
    quantize_(model, masquant_config(recipe))
    assert words(model) == expected
    return recipe, model, expected


def test_the_thinkers_decoder_and_nothing_that_sees_hears_or_speaks():
    model = whole_omni()
    names = list(select(model).linears)
    assert len(names) == 14 and all(n.startswith(DECODER) for n in names)
    assert decoder_of(model) is model.thinker.get_submodule(OMNI_DECODER)
    assert token_reader(model) is model.thinker
    with pytest.raises(ValueError, match="talker.* is not part of the decoder"):
        select(model, include="talker.*")


@pytest.mark.parametrize("beside", [True, False], ids=["from a folder", "in memory"])
def test_what_is_saved_is_loaded_and_writes_the_same(whole, folder, beside, tmp_path):
    _, model, expected = whole
    if beside:
        save_quantized(model, tmp_path / "x", beside=folder)
    else:
        # Its class asks for the speakers, and does not save them.
        save_quantized(model, tmp_path / "x")
    loaded = type(model).from_pretrained(tmp_path / "x")
    assert loaded.speaker_map == SPEAKERS
    assert quantized_names(loaded) == quantized_names(model)
    assert words(loaded) == expected
    assert words(copy.deepcopy(loaded)) == expected


def test_a_quantized_thinker_is_saved_with_the_whole(folder, tmp_path):
    model = type(whole_omni()).from_pretrained(folder)
    quantize_(model.thinker, masquant_config(calibrate(model.thinker, SAMPLES, **FAST)))
    # By itself first: its config is a part of the whole one.
    model.thinker.save_pretrained(tmp_path / "thinker")
    model.save_pretrained(tmp_path / "x")
    torch.save(SPEAKERS, tmp_path / "x" / "spk_dict.pt")
    loaded = type(model).from_pretrained(tmp_path / "x")
    assert words(loaded) == words(model)


def test_quantized_while_it_is_loaded(whole, folder):
    recipe, _, expected = whole
    loaded = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(
        folder, quantization_config=MASQuantHfConfig(recipe=recipe)
    )
    assert words(loaded) == expected


def test_from_disk(whole, folder, tmp_path):
    recipe, model, expected = whole
    save_quantized(model, tmp_path / "expected")
    calibrate_sequential(folder, SAMPLES, output=tmp_path / "x", **FAST)
    loaded = type(model).from_pretrained(tmp_path / "x")
    assert words(loaded) == expected
    assert_same_files(tmp_path / "expected", tmp_path / "x")


def test_its_thinker_is_what_is_scored(whole):
    _, model, _ = whole
    dense = whole_omni()
    labels = PROMPT["input_ids"].masked_fill(PROMPT["input_ids"] < 10, -100)
    found = evaluate(model, {"a": [{**PROMPT, "labels": labels}]}, reference=dense)
    assert found.tasks["a"].examples == 1
    weights = modality_sensitivity(dense, SAMPLES[:1])
    assert set(weights) == {"text", "vision", "audio"}


class _Config(transformers.Qwen2Config):
    """As MiniCPM-V's remote code: the language model's own config, and more."""

    model_type = "remote"


class _Tower(nn.Module):
    """Of plain modules, and of another width than the language model."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(5)])


class Remote(transformers.PreTrainedModel):
    """A model of somebody's own code, who calls the language model as he likes."""

    config_class = _Config
    config: _Config

    def __init__(self, config: _Config, attribute: str = "llm", inside: bool = False):
        super().__init__(config)
        language_model = transformers.Qwen2ForCausalLM(config)
        # Some have their towers in the language model's trunk.
        place = language_model.model if inside else self
        place.vpm = _Tower()
        place.resampler = nn.Linear(24, config.hidden_size)
        self.attribute = attribute
        setattr(self, attribute, language_model)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return getattr(self, self.attribute)(input_ids=input_ids, **kwargs)


def remote(**options: Any) -> Remote:
    config = _Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return Remote(config, **options).eval()


@pytest.mark.parametrize(
    "attribute, inside",
    [("llm", False), ("language_model", True), ("model", False), ("lm", True)],
)
def test_the_language_model_of_remote_code(attribute, inside):
    model = remote(attribute=attribute, inside=inside)
    names = list(select(model).linears)
    assert len(names) == 14
    assert all(re.match(rf"{attribute}\.model\.layers\.\d\.", n) for n in names)
    data = [{"input_ids": torch.arange(60)[None]}]
    quantize_(model, masquant_config(calibrate(model, data, **FAST)))
    assert model(torch.arange(9)[None]).logits.isfinite().all()


class TwoSpeakers(transformers.PreTrainedModel):
    """Two language models of one size: no telling which is meant."""

    config_class = _Config
    config: _Config

    def __init__(self, config: _Config):
        super().__init__(config)
        self.first = transformers.Qwen2ForCausalLM(config)
        self.second = transformers.Qwen2ForCausalLM(config)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.second(input_ids=self.first(input_ids=input_ids).logits.argmax(-1))


def test_a_decoder_that_cannot_be_told_is_asked_for():
    model = TwoSpeakers(remote().config).eval()
    with pytest.raises(
        ValueError, match="TwoSpeakers is its decoder cannot be told.*inc"
    ):
        select(model)
    data = [{"input_ids": torch.arange(60)[None]}]
    recipe = calibrate(model, data, include="first.model.layers.*", **FAST)
    assert len(recipe.layers) == 14


class Wrapper(nn.Module):
    """A plain module around a model that sees, as a trainer's."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model
        self.scale = nn.Linear(4, 4)


def test_a_plain_module_around_a_model():
    names = list(select(Wrapper(tiny_models.qwen25_vl(layers=1))).linears)
    assert len(names) == 7
    assert all(n.startswith("inner.model.language_model.layers.0.") for n in names)
