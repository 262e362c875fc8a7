# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""torchao's own ways to keep a quantized model and a config."""

import json

import pytest
import tiny_models
import torch
from checkpoints import assert_same_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.core.config import ALLOWED_AO_MODULES, config_from_dict, config_to_dict
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantHfConfig,
    MASQuantTensor,
    masquant_config,
)
from torchao_masquant.integrations import torchao_config

FAST = {"alpha": 0.5, "separation": 1.0}


@pytest.fixture(scope="module")
def recipe():
    return tiny_models.recipe_of(tiny_models.PlainModel(), **FAST)


QUANTIZATIONS = [
    {},
    {"scheme": "w8a8", "low_rank_bits": 8, "rank": 3},
    {"scheme": "w4a16", "group_size": 8},
    {"scheme": "w4a4", "rank": 0},
    {"scheme": "w8a8", "method": "smoothquant"},
]


@pytest.mark.parametrize("options", QUANTIZATIONS, ids=str)
def test_flatten_and_unflatten(options, tmp_path):
    """To a safetensors file, and back."""
    options = ({} if "method" in options else FAST) | options
    model = tiny_models.quantized(tiny_models.PlainModel(), **options)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}
        rebuilt, left = unflatten_tensor_state_dict(read, file.metadata())
    assert not left
    assert_same_state(model.state_dict(), rebuilt)
    empty = tiny_models.PlainModel(seed=3)
    quantize_(
        empty,
        MASQuantConfig(
            step="prepare_for_loading",
            scheme=options.get("scheme", "w4a8"),
            group_size=options.get("group_size"),
            modalities=("text", "vision", "audio"),
        ),
    )
    empty.load_state_dict(rebuilt, assign=True)
    assert_same_state(model.state_dict(), empty.state_dict())


def test_torch_save_with_weights_only(tmp_path):
    model = tiny_models.quantized(tiny_models.qwen25_vl(layers=1), **FAST)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    empty = tiny_models.qwen25_vl(layers=1, seed=3)
    quantize_(empty, MASQuantConfig(step="prepare_for_loading"))
    empty.load_state_dict(state, assign=True)
    assert_same_state(model.state_dict(), empty.state_dict())


def test_a_config_with_the_path_of_a_recipe_through_json(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.safetensors")
    config = masquant_config(tmp_path / "recipe.safetensors", exclude="second")
    text = json.dumps(config_to_dict(config))
    again = config_from_dict(json.loads(text))
    assert type(again) is MASQuantConfig
    assert again.recipe == config.recipe == str(tmp_path / "recipe.safetensors")
    assert again.options == config.options == recipe.options
    for other in (config, again, MASQuantHfConfig(config=again).config):
        model = tiny_models.PlainModel()
        quantize_(model, other)
        assert isinstance(model.first.weight, MASQuantTensor)
        assert type(model.second) is nn.Linear


def test_a_config_with_a_recipe_in_memory_has_no_json(recipe):
    config = masquant_config(recipe)
    assert config.recipe is config.loaded_recipe is recipe
    with pytest.raises(TypeError) as error:
        config_to_dict(config)
    assert str(error.value) == (
        "a recipe cannot be written into the JSON of a config: save it, and give the "
        "config its path, as in masquant_config('recipe.safetensors')."
    )


def test_a_recipe_that_is_gone(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.safetensors")
    entry = config_to_dict(masquant_config(tmp_path / "recipe.safetensors"))
    (tmp_path / "recipe.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no recipe file"):
        config_from_dict(entry)


def test_the_json_of_a_config_can_name_no_function_of_ours():
    ours = [name for name in ALLOWED_AO_MODULES if "masquant" in name]
    assert ours == [torchao_config.__name__]
    public = {n for n in vars(torchao_config) if not n.startswith("__")}
    assert public == {"MASQuantConfig"}
    for name in ("partial", "Recipe", "share_smoothing"):
        with pytest.raises(ValueError, match=f"Failed to find class {name}"):
            config_from_dict({"_type": name, "_version": 1, "_data": {}})
