# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Recipes and checkpoints whose decoder lay elsewhere in the model that made them.

transformers moved the decoder of the Omni thinkers from ``model`` to
``model.language_model`` in 5.21; whichever is here, the other is what was saved.
"""

import json
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import entry_of, logits
from tiny_models import BOS, OMNI_DECODER, words
from torchao.quantization import quantize_
from transformers import AutoModelForMultimodalLM

from torchao_masquant import MASQuantHfConfig, Recipe, calibrate, masquant_config

HERE = OMNI_DECODER
THERE = {"model": "model.language_model", "model.language_model": "model"}[HERE]


def sample() -> dict[str, Any]:
    return tiny_models.batch([BOS, *words(6, 3), "image", "audio", *words(3, 5)])


@pytest.fixture(scope="module")
def dense():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def recipe(dense):
    return calibrate(dense, [sample()], alpha=0.5, separation=1.0, progress=False)


def moved(recipe: Recipe) -> Recipe:
    layers = {THERE + n.removeprefix(HERE): x for n, x in recipe.layers.items()}
    return Recipe(recipe.options, recipe.modalities, layers)


def quantized(recipe: Recipe, **options: Any) -> Any:
    model = tiny_models.omni_thinker()
    quantize_(model, masquant_config(recipe, **options))
    return model


def test_a_recipe_fits_wherever_the_decoder_lies(recipe):
    assert torch.equal(
        logits(quantized(moved(recipe)), sample()), logits(quantized(recipe), sample())
    )


def test_patterns_are_those_of_the_model_at_hand(recipe):
    model = quantized(moved(recipe), include=f"{HERE}.layers.0.mlp.*")
    assert type(model.get_decoder().layers[0].mlp.up_proj).__name__ == "MASQuantLinear"
    assert type(model.get_decoder().layers[1].mlp.up_proj).__name__ == "Linear"


def test_a_recipe_quantizes_while_loading_wherever_the_decoder_lies(
    dense, recipe, tmp_path
):
    dense.save_pretrained(tmp_path)
    config = MASQuantHfConfig(recipe=moved(recipe))
    loaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path, quantization_config=config
    )
    assert torch.equal(logits(loaded, sample()), logits(quantized(recipe), sample()))


def test_a_checkpoint_loads_and_keeps_its_options_wherever_the_decoder_lies(
    recipe, tmp_path
):
    model = quantized(recipe)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    before = json.loads(path.read_text())
    layers = before["quantization_config"]["layers"]
    renamed = {THERE + n.removeprefix(HERE): x for n, x in layers.items()}
    after = {**before["quantization_config"], "layers": renamed}
    path.write_text(json.dumps({**before, "quantization_config": after}))

    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, sample()), logits(model, sample()))
    loaded.save_pretrained(tmp_path / "again")
    assert entry_of(tmp_path / "again")["layers"] == layers


def test_a_linear_that_is_nowhere_is_named_as_it_was_saved(recipe):
    name, layer = list(recipe.layers.items())[-1]
    layers = {**moved(recipe).layers, "elsewhere.of_no_model": layer}
    other = Recipe(recipe.options, recipe.modalities, layers)
    with pytest.raises(
        ValueError, match="another model: .* no linear elsewhere.of_no_model;"
    ):
        quantized(other)
