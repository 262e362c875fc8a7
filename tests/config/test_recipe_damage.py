# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Recipes that do not fit: damaged files, parts that contradict each other."""

import copy
import dataclasses
import json
import os

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import (
    LayerRecipe,
    Recipe,
    calibrate,
    masquant_config,
    token_modalities,
)
from torchao_masquant.recipe import weight_fingerprint

NAMES = ("text", "vision", "audio")


@pytest.fixture(scope="module")
def recipe():
    return tiny_models.recipe_of(tiny_models.PlainModel(), rank=2, hadamard_size=1)


@pytest.fixture
def path(recipe, tmp_path):
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    return path


def _edit(path, change_header=None, change_tensors=None, **metadata):
    """Rewrite a recipe file with another header or other tensors."""
    with safe_open(path, framework="pt") as file:
        old = dict(file.metadata())
    header, tensors = json.loads(old["recipe"]), load_file(path)
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    new = old | {"recipe": json.dumps(header)} | metadata
    save_file(tensors, path, {k: v for k, v in new.items() if v is not None})


def _message(path):
    with pytest.raises(ValueError) as error:
        Recipe.load(path)
    return str(error.value).replace(repr(os.fspath(path)), "PATH")


def test_the_file_survives_an_edit(path, recipe):
    """So that the refusals below are of the changes."""
    _edit(path)
    assert repr(Recipe.load(path)) == repr(recipe)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "PATH is a safetensors file, but no MASQuant recipe."),
        ({"format": None}, "PATH is a safetensors file, but no MASQuant recipe."),
        (
            {"format_version": "7"},
            "PATH is of recipe format 7, this version of torchao_masquant reads 2 to 6: "
            "upgrade it.",
        ),
        (
            {"format_version": "1"},
            "PATH is of recipe format 1, this version of torchao_masquant reads 2 to 6: "
            "calibrate again.",
        ),
        (
            {"format_version": None},
            "PATH is no recipe, or a damaged one: 'format_version'.",
        ),
        (
            {"format_version": "x"},
            "PATH is no recipe, or a damaged one: invalid literal for int() with base "
            "10: 'x'.",
        ),
        (
            {"recipe": "{"},
            "PATH is no recipe, or a damaged one: Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1).",
        ),
        ({"recipe": "{}"}, "PATH is no recipe, or a damaged one: 'options'."),
    ],
)
def test_a_header_that_is_wrong(path, metadata, message):
    _edit(path, **metadata)
    assert _message(path) == message


def _drop(key):
    return lambda parts: parts.pop(key)


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (lambda h: h["options"].update(scheme="w1a1"), None, "unknown scheme 'w1a1'"),
        (
            lambda h: h["layers"]["first"].update(shape=[3]),
            None,
            "first is of shape (3,): a",
        ),
        (
            lambda h: h["layers"]["first"].update(shape=[24, 17]),
            None,
            "smoothing_factor of first is of shape (3, 16), it should be (3, 17)",
        ),
        (
            lambda h: h.update(modalities=["text", "vision"]),
            None,
            "first has 2 ranks for 2 modalities",
        ),
        (
            lambda h: h["layers"]["first"].update(ranks=[2, 1]),
            None,
            "l1 of first is of shape (16, 4), it should be (16, 3)",
        ),
        (
            lambda h: h["layers"]["first"].update(ranks=[]),
            None,
            "l1 of first is of shape (16, 4), it should be None",
        ),
        (
            lambda h: h["layers"]["first"].update(hadamard_size=3),
            None,
            "first: hadamard_size must be a power of two, at least 2, that divides the "
            "input width, got hadamard_size=3 for an input width of 16",
        ),
        (
            lambda h: h["layers"]["first"].update(hadamard_size="8"),
            None,
            "first: hadamard_size must be a power of two, at least 2, that divides the "
            "input width, got hadamard_size='8' for an input width of 16",
        ),
        (None, _drop("first.l2"), "l2 of first is of shape None, it should be (4, 24)"),
        (None, _drop("first.smoothing_factor"), "missing 1 required positional"),
        (
            None,
            lambda t: t.update({"first.modality_bias": torch.zeros(3, 23)}),
            "modality_bias of first is of shape (3, 23), it should be (3, 24)",
        ),
        (
            None,
            lambda t: t.update({"first.modality_bias": torch.zeros(2, 24)}),
            "modality_bias of first is of shape (2, 24), it should be (3, 24)",
        ),
        (
            None,
            lambda t: t.update({"first.act_shift": torch.zeros(3, 15)}),
            "act_shift of first is of shape (3, 15), it should be (3, 16)",
        ),
        (
            None,
            lambda t: t.update({"first.qdata": torch.zeros(24, 15).to(torch.int8)}),
            "qdata of first is of shape (24, 15), it should be (24, 16)",
        ),
        (
            None,
            lambda t: t.update({"first.scale": torch.ones(23, 1)}),
            "scale of first is of shape (23, 1), it should be (24, 1)",
        ),
        (
            None,
            lambda t: t.update({"first.zero_point": torch.zeros(24, 2).to(torch.int8)}),
            "zero_point of first is of shape (24, 2), it should be (24, 1)",
        ),
        (None, _drop("first.scale"), "scale of first is of shape None, it should be"),
        (None, _drop("first.qdata"), "qdata of first is of shape None, it should be"),
        (
            None,
            lambda t: t.update({"first.scale": torch.tensor(1.0)}),
            "scale of first is of shape (), it should be (24, 1)",
        ),
        (
            None,
            lambda t: t.update({"first.smoothing_factor": torch.tensor(1.0)}),
            "smoothing_factor of first is of shape (), it should be (3, 16)",
        ),
    ],
)
def test_parts_that_contradict_each_other(path, header, tensors, message):
    _edit(path, header, tensors)
    found = _message(path)
    assert (
        found.startswith("PATH is no recipe, or a damaged one: ") and message in found
    )


def test_every_cut_of_the_file_is_told(path):
    whole = path.read_bytes()
    for keep in (1, 7, -1, *range(0, len(whole), 97)):
        path.write_bytes(whole[:keep])
        assert _message(path).startswith("PATH is no recipe, or a damaged one: ")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe file"):
        Recipe.load(tmp_path)


def test_a_folder_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        recipe.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_with_dots_and_the_model_itself(tmp_path):
    """A linear that is the whole model has an empty name; others hold key names."""
    generator = torch.Generator().manual_seed(0)

    def layer(n=3, k=4):
        factor = torch.rand(2, k, generator=generator) + 0.1
        half = torch.randn(k, 1, generator=generator).half()
        other = torch.randn(1, n, generator=generator).half()
        return LayerRecipe((n, k), "0" * 16, factor, (1,), half, other)

    layers = {name: layer() for name in ("", "l1", "a.l1", "a", "l1.l1")}
    options = tiny_models.recipe_of(tiny_models.PlainModel(), rank=1).options
    recipe = Recipe(options, ("text", "vision"), layers)
    recipe.save(tmp_path / "x")
    for name, part in Recipe.load(tmp_path / "x").layers.items():
        for key, tensor in part.tensors().items():
            assert torch.equal(tensor, layers[name].tensors()[key]), (name, key)
            assert tensor.dtype == layers[name].tensors()[key].dtype


def test_layers_that_share_a_tensor_can_be_saved(recipe, tmp_path):
    """As a recipe that was made or edited by hand may."""
    first = recipe.layers["first"]
    one = torch.ones(1, 16)
    layers = {
        name: dataclasses.replace(
            first, smoothing_factor=one, ranks=(), l1=None, l2=None, modality_bias=None
        )
        for name in ("a", "b")
    }
    shared = Recipe(recipe.options, NAMES, layers)
    shared.save(tmp_path / "x")
    loaded = Recipe.load(tmp_path / "x")
    assert torch.equal(loaded.layers["b"].smoothing_factor, one)


def test_a_single_linear_as_the_model(tmp_path):
    linear = nn.Linear(16, 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 16, generator=generator)
    ids = (torch.arange(10) > 5).long().expand(2, -1)
    recipe = calibrate(
        linear,
        [{"input": x, "modality_ids": ids}],
        scheme="w8a8",
        rank=8,
        modalities=("text", "vision"),
        progress=False,
    )
    recipe.save(tmp_path / "x")
    before = linear(x)
    quantize_(linear, masquant_config(tmp_path / "x"))
    with token_modalities(linear, ids):
        after = linear(x)
    # 8 bits: 0.4 % of the largest of each side, the rest averages out.
    assert (after - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fingerprint_of_each_single_value(dtype):
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {weight_fingerprint(weight)}
    assert seen == {weight_fingerprint(weight.double())} or dtype == torch.float64
    for index in range(15):
        changed = weight.clone()
        flat = changed.view(-1)
        flat[index] = torch.nextafter(flat[index].float(), torch.tensor(9.0)).to(dtype)
        if torch.equal(changed, weight):
            flat[index] *= 1 + 2 * torch.finfo(dtype).eps
        assert not torch.equal(changed, weight)
        seen.add(weight_fingerprint(changed))
    seen.add(weight_fingerprint(weight.reshape(5, 3)))
    assert len(seen) == 17


def test_bfloat16_weights_take_a_recipe_of_their_float32_copy():
    model = tiny_models.PlainModel().bfloat16()
    recipe = tiny_models.recipe_of(copy.deepcopy(model).float(), rank=2)
    quantize_(model, masquant_config(recipe))
    assert model.first.weight.dtype == torch.bfloat16
