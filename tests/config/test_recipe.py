# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``Recipe``: one file, whole or not at all, for the weights it was made for."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from torchao_masquant import Recipe, calibrate
from torchao_masquant.recipe import weight_fingerprint
from torchao_masquant.solver.methods import METHODS
from torchao_masquant.testing import digits


@pytest.fixture(scope="module")
def samples():
    return digits.calibration_samples(8)


@pytest.fixture(scope="module")
def recipe(samples):
    model = digits.load_model("outliers")
    return calibrate(
        model, samples, include="*language_model.layers.0.*", progress=False
    )


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(method, samples, tmp_path):
    model = digits.load_model("outliers")
    recipe = calibrate(
        model, samples, method=method, include="*language*.3.mlp.*", progress=False
    )
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    loaded = Recipe.load(path)
    assert repr(loaded) == repr(recipe)
    assert loaded.options == recipe.options and loaded.versions == recipe.versions
    assert set(loaded.versions) == {
        "torch",
        "torchao",
        "torchao_masquant",
        "transformers",
    }
    for name, layer in recipe.layers.items():
        other = loaded.layers[name]
        assert (layer.shape, layer.fingerprint, layer.ranks) == (
            other.shape,
            other.fingerprint,
            other.ranks,
        )
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, other.tensors()[key])
            assert tensor.dtype == other.tensors()[key].dtype
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.safetensors"]


@pytest.mark.parametrize("broken", ["save_file", "os.replace"])
def test_an_interrupted_save_keeps_the_old_file(recipe, tmp_path, monkeypatch, broken):
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    before = path.read_bytes()

    def interrupt(*arguments, **options):
        if broken == "save_file":
            save_file(*arguments, **options)
        raise KeyboardInterrupt

    target = f"torchao_masquant.recipe.{broken}"
    monkeypatch.setattr(target, interrupt)
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
    recipe.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no recipe, or a damaged one"):
        Recipe.load(path)


def test_a_newer_format_is_refused(recipe, tmp_path, monkeypatch):
    path = tmp_path / "recipe.safetensors"
    monkeypatch.setattr("torchao_masquant.recipe._FORMAT_VERSION", 3)
    recipe.save(path)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=re.escape("is of recipe format 3, this version")
    ):
        Recipe.load(path)


def test_fingerprint_is_of_the_values():
    weight = torch.randn(5, 7).bfloat16()
    first = weight_fingerprint(weight)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert first == weight_fingerprint(weight.float())
    assert first == weight_fingerprint(weight.t().contiguous().t())
    assert first != weight_fingerprint(weight.t())
    changed = weight.clone()
    changed[2, 3] += 0.1
    assert first != weight_fingerprint(changed)
