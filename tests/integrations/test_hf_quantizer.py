# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantizing while transformers loads, and what it does with our config."""

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import assert_same_state, entry_of, logits
from refusals import refused
from tiny_models import BOS, words
from torch.multiprocessing.reductions import StorageWeakRef
from torchao.quantization import quantize_
from transformers import AutoModelForImageTextToText
from transformers.core_model_loading import WeightConverter, WeightRenaming

from torchao_masquant import (
    LayerRecipe,
    MASQuantConfig,
    MASQuantHfConfig,
    MASQuantLinear,
    MASQuantTensor,
    Recipe,
    masquant_config,
)
from torchao_masquant.integrations import hf_quantizing
from torchao_masquant.integrations.attachment import attach_to_transformers
from torchao_masquant.integrations.hf_loading import CheckpointLoading
from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

FAST = {"alpha": 0.5, "separation": 1.0}
RTN = {"step": "convert", "method": "rtn"}


def inputs() -> dict[str, Any]:
    return tiny_models.batch([BOS, *words(6, 3), "image", *words(3, 5)], seed=7)


def weights(model: Any) -> dict[str, MASQuantTensor]:
    return {
        n: m.weight for n, m in model.named_modules() if isinstance(m, MASQuantLinear)
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a dense model, and a recipe for it."""
    model = tiny_models.qwen25_vl()
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return folder, tiny_models.recipe_of(model, **FAST)


def load(folder: Any, config: MASQuantHfConfig, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, **options
    )


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}], ids=str)
def test_quantizing_while_loading_is_quantizing_after(original, options):
    if options:
        pytest.importorskip("accelerate")
    folder, recipe = original
    expected = tiny_models.quantized(tiny_models.qwen25_vl(), recipe)
    model = load(folder, MASQuantHfConfig(recipe=recipe), **options)
    assert_same_state(expected, model)
    assert tiny_models.router(model).modalities == ("text", "vision")
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, MASQuantHfQuantizer)
    assert quantizer.is_serializable() and quantizer.is_compileable
    assert not quantizer.is_trainable
    assert model.config.quantization_config.quant_method == "masquant"
    assert torch.equal(logits(model, inputs()), logits(expected, inputs()))


def test_a_recipe_by_its_path_and_a_part_of_it(original, tmp_path):
    folder, recipe = original
    recipe.save(tmp_path / "recipe.safetensors")
    model = load(folder, MASQuantHfConfig(tmp_path / "recipe.safetensors"))
    assert len(weights(model)) == 14
    config = masquant_config(tmp_path / "recipe.safetensors", exclude="*.down_proj")
    model = load(folder, MASQuantHfConfig(config=config))
    assert len(weights(model)) == 12
    down = model.get_decoder().layers[0].mlp.down_proj
    assert type(down) is torch.nn.Linear and down.weight.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="there is no recipe file"):
        MASQuantHfConfig(recipe=tmp_path / "other.safetensors")


def test_one_weight_of_full_precision_at_a_time(original, monkeypatch):
    """When a weight arrives, those before it are gone."""
    folder, recipe = original
    arrived: list[tuple[str, StorageWeakRef]] = []
    alive: list[int] = []
    load_one = hf_quantizing.QuantizingLoading.load

    def recorded(self: Any, model: Any, name: str, weight: torch.Tensor) -> None:
        gc.collect()
        # The values, whatever tensors share them.
        arrived.append((name, StorageWeakRef(weight.untyped_storage())))
        alive.append(sum(not storage.expired() for _, storage in arrived))
        load_one(self, model, name, weight)

    seen = []
    quantize = LayerRecipe.quantize

    def counted(self: Any, weight: torch.Tensor, *args: Any) -> MASQuantTensor:
        seen.append(weight.dtype)
        return quantize(self, weight, *args)

    monkeypatch.setattr(hf_quantizing.QuantizingLoading, "load", recorded)
    monkeypatch.setattr(LayerRecipe, "quantize", counted)
    # What is there before need not be looked through for each weight.
    gc.collect()
    gc.freeze()
    model = load(folder, MASQuantHfConfig(recipe=recipe))
    gc.collect()
    assert len(arrived) == len(seen) == len(weights(model)) == 14
    assert alive == [1] * 14
    for name, _ in arrived:
        linear = model.get_submodule(name)
        assert set(dict(linear.named_parameters())) <= {"weight", "bias"}
        assert isinstance(linear.weight, MASQuantTensor)


def test_a_quantized_folder_is_not_quantized_again(original, tmp_path):
    folder, recipe = original
    model = load(folder, MASQuantHfConfig(recipe=recipe))
    model.save_pretrained(tmp_path)
    assert [o["scheme"] for o in entry_of(tmp_path)["options"]] == ["w4a8"]
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load(tmp_path, MASQuantHfConfig(config=MASQuantConfig(**RTN)))
    assert_same_state(model, again)


@pytest.mark.parametrize(
    "options, linears",
    [
        ({}, 14),
        (
            {
                "scheme": "w4a16",
                "group_size": 16,
                "include": "re:.*language_model.layers.1.*_proj",
            },
            7,
        ),
    ],
    ids=["all", "a part"],
)
def test_round_to_nearest_needs_no_recipe(original, options, linears):
    folder, _ = original
    expected = tiny_models.quantized(tiny_models.qwen25_vl(), method="rtn", **options)
    config = MASQuantConfig(**RTN, **options)
    model = load(folder, MASQuantHfConfig(config=config))
    assert len(weights(model)) == linears
    assert_same_state(expected, model)


def test_a_config_that_needs_a_calibration_is_refused():
    for config in (
        MASQuantConfig(step="convert"),
        MASQuantConfig(step="convert", method="smoothquant"),
        MASQuantConfig(step="convert", method="masquant-paper", rank=0),
    ):
        with pytest.raises(ValueError) as error:
            MASQuantHfConfig(config=config)
        assert str(error.value) == (
            f"method {config.method!r} needs a calibration: give a recipe from "
            "calibrate(), or method='rtn'."
        )
    with pytest.raises(
        ValueError, match="with step='convert', not with step='prepare'"
    ):
        MASQuantHfConfig(config=MASQuantConfig(step="prepare", method="rtn"))


def test_neither_and_both_are_refused(original):
    _, recipe = original
    for arguments in ({}, {"recipe": recipe, "config": masquant_config(recipe)}):
        with refused("and one of them only"):
            MASQuantHfConfig(**arguments)


def test_a_recipe_for_other_weights(original, tmp_path):
    _, recipe = original
    tiny_models.qwen25_vl(seed=5).save_pretrained(tmp_path)
    with refused("recipe was made for a weight with finger"):
        load(tmp_path, MASQuantHfConfig(recipe=recipe))


def test_a_recipe_for_more_layers_and_for_other_shapes(original, tmp_path):
    folder, recipe = original
    tiny_models.qwen25_vl(layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="made for another model: .* no linear .*yers.1"
    ):
        load(tmp_path, MASQuantHfConfig(recipe=recipe))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"shape \(96, 64\), the model's is \(80, 64\)"
    ):
        load(tmp_path, MASQuantHfConfig(recipe=recipe))


def test_a_weight_that_the_checkpoint_does_not_have(original, tmp_path):
    """It is not made up, as transformers would."""
    folder, recipe = original
    model = tiny_models.qwen25_vl()
    state = model.state_dict()
    name = "model.language_model.layers.1.mlp.up_proj"
    del state[f"{name}.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with refused(f"{name} was not quantized, since the check"):
        load(tmp_path, MASQuantHfConfig(recipe=recipe))


def test_copies_of_a_config_share_its_recipe(original):
    _, recipe = original
    config = MASQuantHfConfig(recipe=recipe)
    copied = copy.deepcopy(config)
    assert copied is not config and copied.config.recipe is recipe
    assert json.loads(config.to_json_string())["quant_method"] == "masquant"


def test_the_recipe_is_let_go_after_loading(original, tmp_path):
    folder, recipe = original
    recipe.save(tmp_path / "recipe.safetensors")
    config = MASQuantHfConfig(recipe=Recipe.load(tmp_path / "recipe.safetensors"))
    reference = weakref.ref(config.config.loaded_recipe)
    model = load(folder, config)
    del config
    gc.collect()
    assert reference() is None
    assert model.hf_quantizer.loading is None


def test_sizes_for_a_device_map(original):
    """What a weight takes in all, over its values, is what it takes in the end."""
    folder, recipe = original
    quantizer = MASQuantHfQuantizer(
        MASQuantHfConfig(recipe=recipe), pre_quantized=False
    )
    dense = tiny_models.qwen25_vl()
    quantizer._process_model_before_weight_loading(dense)
    model = tiny_models.quantized(tiny_models.qwen25_vl(), recipe)
    for name, parameter in dense.named_parameters():
        found = quantizer.param_element_size(dense, name, parameter) * parameter.numel()
        weight = weights(model).get(name.removesuffix(".weight"))
        if weight is None or not name.endswith(".weight"):
            assert found == parameter.nbytes
        else:
            # A recipe's pairs are kept in float32.
            assert weight.nbytes_stored <= found < 1.6 * weight.nbytes_stored


def test_a_disk_in_the_device_map_is_refused(original):
    pytest.importorskip("accelerate")
    folder, recipe = original
    with refused("cannot be offloaded to disk"):
        load(folder, MASQuantHfConfig(recipe=recipe), device_map={"": "disk"})


def test_a_merge_of_experts_beside_quantized_linears():
    """Names that a converter of transformers takes are followed to what it makes."""
    model = tiny_models.quantized(tiny_models.qwen25_vl(layers=1), **FAST)
    attach_to_transformers(model)
    quantizer = model.hf_quantizer
    checkpoint = quantizer.get_state_dict_and_metadata(model)
    names = {n: (t.dtype, tuple(t.shape)) for n, t in checkpoint[0].items()}
    head = names.pop("lm_head.weight")
    names["lm_head.first"] = names["lm_head.second"] = head
    dense = tiny_models.qwen25_vl(layers=1)
    dense.config.architectures = [type(dense).__name__]
    format = quantizer.quantization_config.checkpoint
    quantizer.loading = CheckpointLoading(dense, format, names, torch.float32)
    with refused("has no lm_head.weight"):
        quantizer.update_weight_conversions([], dense)

    class Merge:
        supports_many_to_many = False

    converter = WeightConverter(
        ["lm_head.first", "lm_head.second"], ["lm_head.weight"], [Merge()]
    )
    found = quantizer.update_weight_conversions([converter], dense)
    assert found[0] is converter and len(found) == 2
    # A renaming, too: parts follow their linear's name.
    renamed = {n.replace("language_model", "text"): kind for n, kind in names.items()}
    quantizer.loading = CheckpointLoading(dense, format, renamed, torch.float32)
    renaming = WeightRenaming("model.text.", "model.language_model.")
    assert len(quantizer.update_weight_conversions([converter, renaming], dense)) == 3


def test_quantize_leaves_other_models_alone():
    plain = tiny_models.quantized(tiny_models.PlainModel())
    assert not hasattr(plain, "hf_quantizer")
    model = tiny_models.qwen25_vl(layers=1)
    quantize_(model, MASQuantConfig(step="prepare"))
    assert not hasattr(model, "hf_quantizer")
    other = tiny_models.qwen25_vl(layers=1)
    other.hf_quantizer = "of another method"
    tiny_models.quantized(other, **FAST)
    assert other.hf_quantizer == "of another method"
