# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Checkpoints of models that are quantized in part by us, in part by others."""

import json
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import assert_same_files
from refusals import refused
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForImageTextToText

from torchao_masquant import masquant_config, save_quantized
from torchao_masquant.cli.description import describe

SAVES = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_quantized": lambda model, folder: save_quantized(model, folder),
}
every_way = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


def mixed(config: Any) -> Any:
    """Our decoder behind a tower of torchao's."""
    model = tiny_models.qwen25_vl(layers=1)
    quantize_(model.model.visual, config)
    return tiny_models.quantized(model, scheme="w8a8", alpha=0.5, separation=1.0)


def assert_same(first: Any, second: Any, prompt: Any = (1, 11, "image", 12)) -> None:
    """The same classes of tensors, and the same logits."""
    kinds = {name: type(t) for name, t in first.state_dict().items()}
    assert kinds == {name: type(t) for name, t in second.state_dict().items()}
    call = tiny_models.batch(prompt)
    with torch.no_grad():
        assert torch.equal(first(**call).logits, second(**call).logits)


@pytest.mark.parametrize(
    "config, save",
    [
        (Int8WeightOnlyConfig(), SAVES["save_pretrained"]),
        (Int8DynamicActivationInt8WeightConfig(), SAVES["save_quantized"]),
        (IntxWeightOnlyConfig(torch.int4), SAVES["save_quantized"]),
    ],
    ids=["weights alone", "dynamic activations", "four bits"],
)
def test_a_tower_of_torchao_and_our_decoder(config, save, tmp_path):
    model = mixed(config)
    save(model, tmp_path / "x")
    told = json.loads((tmp_path / "x" / "config.json").read_text())
    assert told["quantization_config"]["format_version"] == 4  # rotated
    assert len(describe(tmp_path / "x").linears) == 7
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert_same(model, loaded)
    # And once more.
    save(loaded, tmp_path / "again")
    assert_same_files(tmp_path / "x", tmp_path / "again")


def test_a_missing_part_of_torchaos_is_told(tmp_path):
    mixed(Int8WeightOnlyConfig()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    entries = config["quantization_config"]["torchao"]
    name = min(entries)
    entries[name] = entries[name].replace('"qdata"', '"pre_scale", "qdata"')
    assert "pre_scale" in entries[name]
    path.write_text(json.dumps(config))
    with refused("_weight_pre_scale, which its config.json"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_class_of_tensors_that_torchao_does_not_have_is_told(tmp_path):
    mixed(Int8WeightOnlyConfig()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("Int8Tensor", "Int7Tensor"))
    with refused("is a Int7Tensor, which is no tensor of this"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


class Ternary(TorchAOBaseTensor):
    """A tensor that torchao's safetensors support does not know."""

    tensor_data_names = ["data_"]
    tensor_attribute_names: list[str] = []

    def __new__(cls, data_: torch.Tensor) -> "Ternary":
        return torch.Tensor._make_wrapper_subclass(
            cls, data_.shape, dtype=torch.float32, device=data_.device
        )

    def __init__(self, data_: torch.Tensor):
        self.data_ = data_


@every_way
def test_what_cannot_be_stored_is_refused_before_a_file_is_written(save, tmp_path):
    model = tiny_models.quantized(tiny_models.qwen25_vl(layers=1), method="rtn")
    weight = model.lm_head.weight.data.sign().to(torch.int8)
    model.lm_head.weight = nn.Parameter(Ternary(weight), requires_grad=False)
    with refused("lm_head.weight is a Ternary"):
        save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@every_way
def test_weights_without_values_are_refused(save, tmp_path):
    model = tiny_models.quantized(tiny_models.qwen25_vl(layers=1), method="rtn")
    model.lm_head.to("meta")
    with refused("lm_head.weight is on the meta device"):
        save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_that_transformers_quantized_with_torchao(tmp_path):
    from transformers import TorchAoConfig

    dense = tiny_models.qwen25_vl(layers=1)
    recipe = tiny_models.recipe_of(dense, method="rtn", scheme="w8a8")
    dense.save_pretrained(tmp_path / "dense")
    config = TorchAoConfig(
        Int8WeightOnlyConfig(),
        modules_to_not_convert=["model.language_model", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "dense", quantization_config=config
    )
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(tmp_path / "x")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert_same(model, loaded)


@every_way
def test_a_quantized_part_is_saved_with_the_model_around_it(save, tmp_path):
    """Whoever quantized the part did not have the whole in hand."""
    model = tiny_models.qwen25_vl(layers=1)
    recipe = tiny_models.recipe_of(model, method="rtn")
    prefix = "model.language_model."
    recipe.layers = {n.removeprefix(prefix): v for n, v in recipe.layers.items()}
    recipe.modalities = ("text",)
    quantize_(model.model.language_model, masquant_config(recipe))
    save(model, tmp_path / "x")
    told = json.loads((tmp_path / "x" / "config.json").read_text())
    layers = told["quantization_config"]["layers"]
    assert len(layers) == 7 and all(n.startswith(prefix) for n in layers)
    assert {entry["options"] for entry in layers.values()} == {0}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert_same(model, loaded, prompt=(1, 11, 12))
