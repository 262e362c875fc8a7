# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Files that earlier versions have written, against what those computed with them."""

import json
from typing import Any

import earlier_files
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import quantize_
from transformers import AutoModelForImageTextToText

from torchao_masquant import MASQuantTensor, Recipe, masquant_config
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

# Folder to the formats of its checkpoint, and of its recipes for linears and experts.
FORMATS = {
    "format_2": (2, 2, 3),
    "format_3": (3,),
    "format_4": (4, 4, 4),
    "format_5": (5, 5, 4),
}
WITH_RECIPES = [name for name, formats in FORMATS.items() if len(formats) > 1]


def from_checkpoint(name: str) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(earlier_files.DATA / name)


def from_recipes(name: str) -> nn.Module:
    model = earlier_files.model()
    for file in earlier_files.RECIPES:
        recipe = Recipe.load(earlier_files.DATA / name / file)
        quantize_(model, masquant_config(recipe))
    return model


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of all quantized weights, by name."""
    return {
        f"{name} {part}": tensor
        for name, weight in model.named_parameters()
        if isinstance(weight.data, MASQuantTensor)
        for part, tensor in weight.data.parts().items()
    }


def error(model: nn.Module, inputs: dict[str, Any], expected: torch.Tensor) -> float:
    with torch.no_grad():
        found = model(**inputs).logits
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_those_that_the_folders_are_called_after(name):
    """And small enough to be kept."""
    folder = earlier_files.DATA / name
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = [entry["format_version"]]
    for file in earlier_files.RECIPES if name in WITH_RECIPES else ():
        with safetensors.safe_open(folder / file, framework="pt") as recipe:
            found.append(int(recipe.metadata()["format_version"]))
    assert tuple(found) == FORMATS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000


@pytest.mark.parametrize(
    "name, make",
    [(name, from_checkpoint) for name in FORMATS]
    + [(name, from_recipes) for name in WITH_RECIPES],
)
def test_earlier_files_give_what_they_gave(name, make):
    expected = load_file(earlier_files.DATA / name / earlier_files.OUTPUTS)["logits"]
    inputs, model = earlier_files.inputs(0), make(name)
    # Another order of sums may round a few activations to the next integer of 8 bits, or
    # float of 4.
    assert error(model, inputs, expected) < (0.05 if name == "format_5" else 0.01)
    # Were a modality misread, it would show.
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert error(model, swapped, expected) > 0.1


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_a_recipe_gives_the_weights_of_its_checkpoint(name):
    """Bit for bit, of linears and of experts."""
    stored, made = parts(from_checkpoint(name)), parts(from_recipes(name))
    assert stored.keys() == made.keys()
    # All that integers have, and floats where there are any.
    floats = {"row_scale"} if name == "format_5" else set()
    assert {n.rpartition(" ")[2] for n in stored} == set(PARTS) - {"row_scale"} | floats
    for part, tensor in stored.items():
        assert tensor.dtype == made[part].dtype, part
        assert torch.equal(tensor, made[part]), part
