# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The plain functions leave what ``quantize_`` leaves with the config that says the same."""

import json
from pathlib import Path
from typing import Any

import expert_models
import pytest
import tiny_models
import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantTensor,
    Recipe,
    masquant_config,
    token_modalities,
)
from torchao_masquant.options import QuantizationOptions
from torchao_masquant.quantize import (
    apply_recipe,
    convert,
    prepare,
    prepare_for_loading,
)

FAST = {"alpha": 0.5, "separation": 1.0}


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen25_vl(layers=1)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_models.recipe_of(tiny_models.qwen25_vl(layers=1), **FAST)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found = second[name]
        assert type(found) is type(tensor), name
        if isinstance(tensor, MASQuantTensor):
            assert tensor.same_layout(found), name
            for part in tensor.__tensor_flatten__()[0]:
                assert torch.equal(getattr(tensor, part), getattr(found, part)), name
        else:
            assert torch.equal(tensor, found), name
    ours, theirs = ([type(m) for m in each.modules()] for each in (model, other))
    assert ours == theirs


def test_a_recipe(model: Any, recipe: Recipe, tmp_path: Path) -> None:
    """transformers is told as much, and a checkpoint tells as much, either way."""
    other = tiny_models.qwen25_vl(layers=1)
    apply_recipe(model, recipe, exclude="*.q_proj")
    quantize_(other, masquant_config(recipe, exclude="*.q_proj"))
    assert_same(model, other)
    assert model.is_quantized and other.is_quantized
    told = []
    for each in (model, other):
        each.save_pretrained(tmp_path)
        told.append(json.loads((tmp_path / "config.json").read_text()))
    assert told[0] == told[1]
    assert told[0]["quantization_config"]["description"] == recipe.provenance


def test_steps_for_linears_and_experts() -> None:
    model, other = expert_models.MoEModel(), expert_models.MoEModel()
    given = {"scheme": "w4a6", "modalities": expert_models.NAMES, **FAST}
    asked = QuantizationOptions(**given)
    prepare(model, asked)
    quantize_(other, MASQuantConfig(step="prepare", **given))
    for sample in expert_models.samples():
        for each in (model, other):
            with token_modalities(each, sample["modality_ids"]):
                each(sample["x"])
    convert(model, asked)
    quantize_(other, MASQuantConfig(step="convert", **given))
    assert_same(model, other)
    empty, other = expert_models.MoEModel(seed=1), expert_models.MoEModel(seed=1)
    prepare_for_loading(empty, asked)
    quantize_(other, MASQuantConfig(step="prepare_for_loading", **given))
    assert_same(empty, other)
    # In its memory, which has room for all that the method makes.
    empty.load_state_dict(model.state_dict())
    sample = expert_models.sample(9)
    outputs = []
    for each in (empty, model):
        with token_modalities(each, sample["modality_ids"]), torch.no_grad():
            outputs.append(each(sample["x"]))
    assert torch.equal(*outputs)


def test_rounding_a_compiled_model(model: Any) -> None:
    other = tiny_models.qwen25_vl(layers=1)
    convert(torch.compile(model), QuantizationOptions("w8a8", "rtn"))
    quantize_(other, MASQuantConfig(step="convert", scheme="w8a8", method="rtn"))
    assert_same(model, other)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (apply_recipe, {"include": "*.visual.*"}, "'.*visual.*' matches no linear"),
        (
            prepare,
            {"asked": QuantizationOptions(hadamard_size=64)},
            "=64 does not divide",
        ),
        (
            convert,
            {"asked": QuantizationOptions()},
            "has no observed linear to convert",
        ),
        (
            prepare_for_loading,
            {"asked": QuantizationOptions(base_modality="audio")},
            "base_modality 'audio' is not one of",
        ),
    ],
)
def test_what_is_refused_changes_nothing(
    model: Any, recipe: Recipe, function: Any, given: dict[str, Any], message: str
) -> None:
    before = [type(m) for m in model.modules()]
    if function is apply_recipe:
        given = {"recipe": recipe, **given}
    with pytest.raises(ValueError, match=message):
        function(model, **given)
    assert [type(m) for m in model.modules()] == before
    assert "forward" not in vars(model) and not hasattr(model, "hf_quantizer")
