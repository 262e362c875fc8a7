# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Decoders of many kinds, calibrated one block at a time as they are in memory."""

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from torchao.quantization import quantize_

from torchao_masquant import Recipe, calibrate, masquant_config
from torchao_masquant.sequential import calibrate_sequential

# What is particular about each: features added between the layers; experts; a mask of
# each layer's own; towers in the decoder; linear attention; no tower at all.
NAMES = [
    "Qwen3-VL",
    "Qwen3-VL-MoE",
    "Qwen3-Omni-MoE thinker",
    "Gemma 3",
    "Phi-4-multimodal",
    "MiniCPM-V 4.6",
    "Llama",
]
OPTIONS = {"rank": 2, "alpha": 0.5, "separation": 1.0, "progress": False}


def stored(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_as_in_memory(name, tmp_path):
    family = next(family for family in FAMILIES if family.name == name)
    model = family.model()
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    kind = type(model)
    model = kind.from_pretrained(tmp_path / "model")
    data = [family.mixed(1), family.padded(2)]
    recipe = calibrate(model, data, **OPTIONS)
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(tmp_path / "expected")
    calibrate_sequential(
        tmp_path / "model",
        data,
        output=tmp_path / "quantized",
        recipe=tmp_path / "recipe.safetensors",
        model_class=kind,
        **OPTIONS,
    )
    found = Recipe.load(tmp_path / "recipe.safetensors")
    assert list(found.layers) == list(recipe.layers)
    for linear, layer in recipe.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, found.layers[linear].tensors()[key]), linear
    expected, quantized = stored(tmp_path / "expected"), stored(tmp_path / "quantized")
    assert expected.keys() == quantized.keys()
    for tensor_name, tensor in expected.items():
        assert torch.equal(tensor, quantized[tensor_name]), tensor_name
    assert kind.from_pretrained(tmp_path / "quantized")
