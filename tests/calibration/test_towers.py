# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Towers: linears that meet one modality, of which each image and each sound counts alike."""

import copy
import logging

import pytest
import tiny_models
import torch
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from torchao_masquant import (
    MASQuantConfig,
    MASQuantLinear,
    Recipe,
    calibrate,
    evaluate,
    masquant_config,
)
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.calibration.tower_items import items_of
from torchao_masquant.routing import PADDING, Router
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.statistics.input_statistics import Moments

SCHEMES = {"scheme": "w4a8", "towers": "w8a8"}
TOWERS = ("model.visual.*", "model.audio_tower.*")
OF_SOUND = "model.audio_tower.layers.0.fc1"
OF_IMAGE = "model.visual.blocks.0.attn.proj"


@pytest.fixture(scope="module")
def model():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def recipe(model):
    return tiny_models.recipe_of(model, **SCHEMES)


@pytest.fixture(scope="module")
def sample(model):
    return tiny_models.samples(audio=True)[0]


def logits(model, sample):
    with torch.no_grad():
        return model(**sample).logits


@pytest.fixture(scope="module")
def quantized(model, recipe, sample):
    """The model, and what it says."""
    found = copy.deepcopy(model)
    quantize_(found, masquant_config(recipe))
    return found, logits(found, sample)


def test_towers_have_a_scheme_and_a_modality_of_their_own(recipe, quantized, model):
    found = {
        (layer.scheme, layer.modalities, layer.ranks != ())
        for name, layer in recipe.layers.items()
    }
    decoder = {(None, None, True)}
    assert found == decoder | {
        ("w8a8", ("vision",), False),
        ("w8a8", ("audio",), False),
    }
    weight = quantized[0].get_submodule(OF_SOUND).weight
    assert (weight.weight_bits, weight.modalities) == (8, ("audio",))
    assert tuple(weight.act_shift.shape) == (1, 32)
    # No id that a call knows is theirs.
    assert quantized[0].get_submodule(OF_SOUND).router is None


def test_two_calls_do_what_one_does(model, recipe, quantized, sample):
    """However many passes the data takes."""
    other = copy.deepcopy(model)
    few = {"max_statistics_bytes": 1 << 17}
    towers = tiny_models.recipe_of(model, scheme="w8a8", include=TOWERS, **few)
    quantize_(other, masquant_config(towers))
    quantize_(other, masquant_config(recipe, include="model.language_model.*"))
    assert torch.equal(logits(other, sample), quantized[1])


def test_observed_by_steps(model, quantized, sample):
    other = copy.deepcopy(model)
    quantize_(other, MASQuantConfig(step="prepare", **SCHEMES))
    for each in tiny_models.samples(audio=True):
        logits(other, each)
    quantize_(other, MASQuantConfig(step="convert", **SCHEMES))
    assert torch.equal(logits(other, sample), quantized[1])


@pytest.mark.parametrize("part", [False, True])
def test_saved_and_loaded(quantized, sample, recipe, tmp_path, part):
    """By another class, too, in which towers have other names."""
    model, said = quantized
    model.save_pretrained(tmp_path)
    recipe.save(tmp_path / "recipe")
    assert Recipe.load(tmp_path / "recipe").layers == recipe.layers
    if part:
        inner = type(model.model).from_pretrained(tmp_path)
        weight = inner.get_submodule(OF_SOUND.removeprefix("model.")).weight
        assert torch.equal(weight.qdata, model.get_submodule(OF_SOUND).weight.qdata)
        return
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.quantization_config.to_dict()["format_version"] == 6
    assert torch.equal(logits(loaded, sample), said)
    # Of text alone, which no tower's modalities may refuse.
    assert logits(loaded, tiny_models.batch(tiny_models.words(4), audio=True)).any()


def test_a_budget_that_comes_with_the_second_step_is_refused(model, sample):
    other = copy.deepcopy(model)
    quantize_(other, MASQuantConfig(step="prepare", **SCHEMES))
    logits(other, sample)
    with pytest.raises(ValueError, match="a budget is for decoders alone, and model"):
        quantize_(other, MASQuantConfig(step="convert", budget="12 bits"))
    assert not any(isinstance(m, MASQuantLinear) for m in other.modules())


def test_zeros_take_a_state_dict(model, quantized, sample):
    other = copy.deepcopy(model)
    quantize_(other, MASQuantConfig(step="prepare_for_loading", **SCHEMES))
    other.load_state_dict(quantized[0].state_dict(), assign=True)
    assert torch.equal(logits(other, sample), quantized[1])


def test_rounded_to_nearest(model):
    other = copy.deepcopy(model)
    config = MASQuantConfig(step="convert", method="rtn", **SCHEMES)
    quantize_(other, config)
    found = {
        (m.weight.weight_bits, m.weight.modalities)
        for m in other.modules()
        if isinstance(m, MASQuantLinear)
    }
    assert found == {
        (4, ("text", "vision", "audio")),
        (8, ("audio",)),
        (8, ("vision",)),
    }


def test_evaluated_beside_the_original(quantized, model, sample):
    labelled = [{**sample, "labels": sample["input_ids"]}]
    found = evaluate(quantized[0], labelled, reference=model, progress=False)
    assert (found.modalities, found.quantized_linears) == (
        ("text", "vision", "audio"),
        30,
    )


def test_compiled(quantized):
    block = quantized[0].model.visual.merger.mlp
    x = torch.randn(8, block[0].in_features)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


def test_images_of_any_size_and_sounds_of_any_length_weigh_the_same():
    sizes = {"image_grid_thw": torch.tensor([[1, 2, 2], [1, 8, 8]])}
    # A merger makes one token of each four.
    for patches in (68, 17):
        found = items_of(torch.zeros(patches, 3), "vision", sizes)
        small = 4 * patches // 68
        assert (found.count, found.ids) == (2, None)
        assert found.weights[:small].sum().item() == pytest.approx(1)
        assert found.weights[small:].sum().item() == pytest.approx(1)
    # Of 8 frames each, of which a convolution made 4; padding is no sound.
    mask = {"feature_attention_mask": (torch.arange(8) < torch.tensor([[8], [3]]))}
    found = items_of(torch.zeros(2, 4, 3), "audio", mask)
    assert found.ids.tolist() == [0, 0, 0, 0, 0, 0, PADDING, PADDING]
    assert found.weights[:6].tolist() == [0.25] * 4 + [0.5] * 2
    packed = items_of(torch.zeros(6, 3), "audio", mask)
    assert packed.weights.tolist() == [0.25] * 4 + [0.5] * 2
    # Frames that were merged in other ways, as in chunks of 100 to 13 tokens each.
    mask = {"feature_attention_mask": torch.arange(250) < torch.tensor([[250], [40]])}
    chunked = items_of(torch.zeros(33 + 5, 3), "audio", mask)
    assert chunked.weights.tolist() == [1 / 33] * 33 + [1 / 5] * 5
    # What is pooled to fewer rows than there are sounds has no more of them.
    assert items_of(torch.zeros(1, 3), "audio", mask).count == 1
    # Two images of 34 patches each could be merged to the 17 of a video.
    images = torch.tensor([[1, 2, 17], [1, 2, 17]])
    both = {"image_grid_thw": images, "video_grid_thw": torch.tensor([[1, 2, 17]])}
    assert items_of(torch.zeros(34, 3), "vision", both).count == 1
    assert items_of(torch.zeros(68, 3), "vision", both).count == 2
    # Patches of a small image are padded to those of a large one.
    mask = {"pixel_attention_mask": torch.arange(6) < torch.tensor([[6], [2]])}
    padded = items_of(torch.zeros(2, 6, 3), "vision", mask)
    assert padded.ids.tolist() == [0] * 8 + [PADDING] * 4
    assert padded.weights[6:8].tolist() == [0.5] * 2
    # Rows and columns of patches are of an image.
    assert items_of(torch.zeros(2, 4, 5, 3), "vision", {}).count == 2
    assert items_of(torch.zeros(0, 4, 3), "audio", mask).count == 0
    # Of what does not fit, one.
    assert items_of(torch.zeros(5, 3), "vision", sizes).count == 1
    assert items_of(torch.zeros(3, 5, 3), "vision", {}).count == 3


def test_weights_are_those_of_means_covariances_and_samples():
    x = torch.randn(1200, 4, generator=torch.Generator().manual_seed(0))
    x[:1000, 0] += 5
    weights = torch.cat((torch.full((1000,), 1 / 1000), torch.full((200,), 1 / 200)))
    moments = Moments.zeros(4, torch.device("cpu"), second=True)
    moments.update(x[:1100], weights[:1100])
    moments.update(x[1100:], weights[1100:])
    w = weights.double()[:, None]
    mean = (w * x.double()).sum(0) / 2
    covariance = (w * x.double()).t() @ x.double() / 2 - torch.outer(mean, mean)
    torch.testing.assert_close(moments.mean(), mean)
    torch.testing.assert_close(moments.covariance(), covariance)
    # Half of the sample, with room for chance: without weights a sixth would be.
    small = (moments.sample[:, 0] < 2.5).double().mean().item()
    assert 0.4 < small < 0.6


def test_a_large_image_does_not_drown_a_small_one(model):
    """What a session keeps of both is what it keeps of one after the other."""
    linears = {OF_IMAGE: model.get_submodule(OF_IMAGE)}
    router = Router.for_model(model)
    router.skip_padding = True
    parts = tiny_models.batch(
        [*tiny_models.words(2), "image", "small image"], audio=True
    )
    session = CalibrationSession(linears, router, True, towers={OF_IMAGE: "vision"})
    with session.observing(model), torch.no_grad():
        model(**parts)
    (moments,) = session.statistics[OF_IMAGE].moments
    assert (moments.count, moments.weight, session.sequences) == (20, 2.0, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"epochs": 1},
            "learning goes through .*, and model.audio_tower.* is of a tower",
        ),
        ({"budget": "6 bits"}, "a budget is for decoders alone, .* by themselves"),
        ({"towers": "w9a9"}, "unknown scheme 'w9a9'"),
        (
            {"scheme": "w8a8", "target": "compressed-tensors"},
            "towers='w8a8' has no place",
        ),
        (
            {"scheme": "w8a8", "towers": None, "target": "compressed-tensors"}
            | {"include": "model.visual.*"},
            "is for decoders alone",
        ),
        ({"include": "lm_head"}, "lm_head is not part of the decoder, nor of a tower"),
        (
            {"include": "model.language_model.*"},
            "towers='w8a8' .* no linear of a tower is chosen",
        ),
        (
            {"towers": "w4a16", "group_size": 16},
            "by themselves, with include and group_size=8 or 16, which divides all",
        ),
        ({"include": "model.visual.patch_embed.*"}, "matches no linear"),
    ],
)
def test_refused_in_a_sentence(model, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_models.recipe_of(model, **{**SCHEMES, **options})


def test_a_model_without_towers_is_told_so():
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    config = LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes)
    with pytest.raises(ValueError, match="no linear of a tower is .* LlamaForCausalLM"):
        calibrate(LlamaForCausalLM(config), [{}], towers="w8a8")


def test_in_a_tower_no_other_modality_competes(model, recipe):
    """So that what its own weighs changes nothing there, be it nothing."""
    weighed = tiny_models.recipe_of(
        model, **SCHEMES, modality_weights={"vision": 0, "audio": 0.3}
    )
    assert weighed.layers[OF_IMAGE] == recipe.layers[OF_IMAGE]
    assert weighed.layers[OF_SOUND] == recipe.layers[OF_SOUND]


def test_a_tower_that_nothing_runs_through_is_named(model):
    mute = [tiny_models.batch(["image", *tiny_models.words(70)], audio=True)]
    with pytest.raises(ValueError, match="audio_tower.* was never called by the calib"):
        calibrate(model, mute, progress=False, include=TOWERS)


def test_from_disk_refuses_towers(model, sample, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is of a tower, and calibrating from disk"):
        calibrate_sequential(
            tmp_path / "dense", [sample], output=tmp_path / "out", **SCHEMES
        )


def test_convolutions_are_told_of(model, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_models.recipe_of(model, include="model.visual.*")
    assert "left out 3 convolutions of towers, model.audio_tower.conv1" in caplog.text
