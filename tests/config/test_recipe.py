# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``Recipe``: one file, whole or not at all, for the weights it was made for."""

import dataclasses
import os
import re

import pytest
import tiny_models
import torch
from checkpoints import assert_same_recipe, assert_same_state
from safetensors.torch import save_file
from torchao.quantization import quantize_

from torchao_masquant import MASQuantLinear, Recipe, masquant_config
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, read_header, weight_fingerprint


@pytest.fixture(scope="module")
def recipe():
    return tiny_models.recipe_of(tiny_models.PlainModel(), rank=2)


#: Parts of a solution beside its factors, which every one has.
INTEGERS = {"qdata", "scale"}
PAIRS = {"l1", "l2"}


@pytest.mark.parametrize(
    ("scheme", "options", "parts"),
    [
        ("w4a8", {}, INTEGERS | PAIRS | {"modality_bias", "act_shift"}),
        ("w8a8", {"rank": 0}, INTEGERS | {"modality_bias", "act_shift"}),
        ("w4a8", {"shift": False}, INTEGERS | PAIRS | {"modality_bias"}),
        (
            "w4a8",
            {"rounding": "nearest", "clip": False},
            PAIRS | {"modality_bias", "act_shift"},
        ),
        (
            "w4a8",
            {"rounding": "nearest"},
            INTEGERS | PAIRS | {"modality_bias", "act_shift"},
        ),
        ("w3a3", {"group_size": 4}, INTEGERS | PAIRS | {"modality_bias", "act_shift"}),
        (
            "w4a16",
            {"group_size": 8},
            INTEGERS | PAIRS | {"modality_bias", "zero_point"},
        ),
        (
            "w4a16",
            {"group_size": 8, "rounding": "nearest", "clip": False},
            PAIRS | {"modality_bias"},
        ),
        (
            "w4a8",
            {"low_rank_bits": 8},
            INTEGERS | PAIRS | {"modality_bias", "act_shift"},
        ),
        ("w4a8", {"method": "masquant-paper"}, PAIRS),
        ("w8a8", {"method": "smoothquant"}, set()),
        ("w4a16", {"method": "rtn", "group_size": 8}, set()),
    ],
    # Sets have no order of their own, and ids must be the same in every process.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_every_part_comes_back(scheme, options, parts, tmp_path):
    """And the model that is quantized from the file is the same, bit for bit."""
    recipe = tiny_models.recipe_of(
        tiny_models.PlainModel(), scheme=scheme, **({"rank": 2} | options)
    )
    recipe.save(tmp_path / "x")
    loaded = Recipe.load(tmp_path / "x")
    assert_same_recipe(recipe, loaded)
    assert repr(loaded) == repr(recipe) and loaded.nbytes == recipe.nbytes
    assert loaded.versions == recipe.versions and set(loaded.versions) == {
        *("torch", "torchao", "torchao_masquant", "transformers")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    for layer in loaded.layers.values():
        other = layer.tensors()
        assert other.keys() == parts | {"smoothing_factor"}
        n, k = layer.shape
        groups = k // options["group_size"] if "group_size" in options else 1
        for key, (shape, dtype) in {
            "qdata": ((n, k), torch.int8),
            "scale": ((n, groups), torch.float32),
            "zero_point": ((n, groups), torch.int8),
            "modality_bias": ((3, n), torch.float32),
            "act_shift": ((3, k), torch.float32),
        }.items():
            if key in other:
                assert (tuple(other[key].shape), other[key].dtype) == (shape, dtype)
    models = tiny_models.PlainModel(), tiny_models.PlainModel()
    quantize_(models[0], masquant_config(recipe))
    quantize_(models[1], masquant_config(tmp_path / "x"))
    assert_same_state(*models)


@pytest.mark.parametrize("scheme, rounding", [("w4a8", "nearest"), ("w4a16", "gptq")])
def test_rotations_come_back(scheme, rounding, tmp_path):
    """In a file that a reader which does not know of them refuses by its version."""
    recipe = tiny_models.recipe_of(
        tiny_models.PlainModel(),
        scheme=scheme,
        group_size=8,
        rank=2,
        rounding=rounding,
        clip=False,
        hadamard_size=1,
    )
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    version, header = read_header(path)
    assert version == 2
    assert not any("hadamard_size" in layer for layer in header["layers"].values())
    plain = recipe.layers["first"]
    recipe.layers["first"] = dataclasses.replace(plain, hadamard_size=8)
    assert recipe.layers["first"] != plain
    recipe.save(path)
    assert read_header(path)[0] == 4
    loaded = Recipe.load(path)
    assert {name: layer.hadamard_size for name, layer in loaded.layers.items()} == {
        **dict.fromkeys(recipe.layers),
        "first": 8,
    }
    model = tiny_models.PlainModel()
    weight = model.first.weight.detach().clone()
    quantize_(model, masquant_config(path))
    found = model.first.weight.data
    assert found.hadamard_size == 8
    part = loaded.layers["first"]
    bits = recipe.options.number_format
    assert part.made(found, bits, recipe.modalities)
    assert not plain.made(found, bits, recipe.modalities)
    if rounding == "nearest":
        # Rounded where it is rotated: the dense weight comes back, but for the rounding.
        lost = (found.dequantize() - weight).norm() / weight.norm()
        assert lost < 0.15


def test_a_recipe_from_before_rotations_rotates_nothing(tmp_path):
    """Its options leave the rotation to the method, whose layers had none."""
    model = tiny_models.omni_thinker()
    made = tiny_models.recipe_of(model, hadamard_size=1)
    recipe = dataclasses.replace(made, options=SolverOptions())
    recipe.save(tmp_path / "old")
    assert "hadamard_size" not in str(read_header(tmp_path / "old"))
    config = masquant_config(tmp_path / "old")
    quantize_(model, config)
    weights = [m.weight for m in model.modules() if isinstance(m, MASQuantLinear)]
    assert weights and all(weight.hadamard_size is None for weight in weights)
    # Its options are solved for as today's.
    again = tiny_models.recipe_of(tiny_models.omni_thinker(), **vars(config.options))
    assert all(layer.hadamard_size for layer in again.layers.values())


def test_rotations_that_do_not_fit(recipe, tmp_path):
    name, layer = next(iter(recipe.layers.items()))
    with pytest.raises(ValueError, match=f"{re.escape(name)}: hadamard_size must be a"):
        dataclasses.replace(layer, hadamard_size=3).check(name, len(recipe.modalities))
    parts = [dataclasses.replace(layer, hadamard_size=size) for size in (4, None)]
    with pytest.raises(ValueError, match="experts of a mixture share one rotation"):
        LayerRecipe.stack(parts, "")


def test_an_interrupted_save_keeps_the_old_file(recipe, tmp_path, monkeypatch):
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    before = path.read_bytes()

    def interrupt(*arguments, **options):
        save_file(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("torchao_masquant.recipe.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recipe.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["recipe.safetensors"]


def test_a_missing_folder(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        recipe.save(tmp_path / "nowhere" / "recipe.safetensors")


def test_files_that_are_no_recipe(recipe, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="there is no recipe file"):
        Recipe.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is no recipe, or a damaged one"):
        Recipe.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(
        ValueError, match="is a safetensors file, but no MASQuant recipe"
    ):
        Recipe.load(path)
    # Whatever it is, it is not written over.
    with pytest.raises(ValueError, match="is no recipe, so it is not written over"):
        recipe.save(path)


def test_fingerprint_is_of_the_values():
    weight = torch.randn(5, 7).bfloat16()
    first = weight_fingerprint(weight)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert first == weight_fingerprint(weight.float())
    assert first == weight_fingerprint(weight.t().contiguous().t())
    assert first != weight_fingerprint(weight.t())
