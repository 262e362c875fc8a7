# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``quantize_`` with a recipe, and what it refuses before anything is changed."""

import copy
import re
from typing import Any, Callable, Optional

import pytest
import tiny_models
import torch
from checkpoints import assert_same_state
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER

from torchao_masquant import MASQuantConfig, MASQuantLinear, Recipe, masquant_config

LAST = r"re:.*language_model\.layers\.1\..*"

#: Nothing to choose between, where all of a model is solved for.
FAST = {"alpha": 0.5, "separation": 1.0}


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen25_vl()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_models.recipe_of(tiny_models.qwen25_vl(), **FAST)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def quantized(model: nn.Module) -> list[str]:
    return [n for n, kind in kinds(model).items() if kind is MASQuantLinear]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**tiny_models.samples(audio=False)[0]).logits


def test_one_line_quantizes_the_decoder_alone(model, recipe, tmp_path):
    recipe.save(tmp_path / "recipe.safetensors")
    other = copy.deepcopy(model)
    names = list(model.state_dict())
    quantize_(model, masquant_config(recipe))
    quantize_(other, masquant_config(tmp_path / "recipe.safetensors"))
    assert_same_state(model, other)
    assert list(model.state_dict()) == names
    assert quantized(model) == list(recipe.layers)
    decoder = {id(m) for m in model.get_decoder().layers.modules()}
    assert all(id(model.get_submodule(n)) in decoder for n in recipe.layers)
    assert len(recipe.layers) == 2 * 7
    assert not any(model.get_submodule(n).weight.requires_grad for n in recipe.layers)


def test_observed_models_answer_as_before(model):
    before = logits(model)
    quantize_(model, MASQuantConfig(step="prepare"))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (None, "has no observed linear to convert"),
        ({"method": "rtn"}, "method 'masquant' needs covariances"),
    ],
)
def test_convert_out_of_order(
    model: Any, first: Optional[dict[str, Any]], message: str
) -> None:
    if first is not None:
        quantize_(model, MASQuantConfig(step="prepare", **first))
    before = kinds(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, MASQuantConfig(step="convert"))
    assert kinds(model) == before
    logits(model)


def _changed_weight(mlp: Any) -> None:
    mlp.down_proj.weight.data[5, 5] += 1


def _another_shape(mlp: Any) -> None:
    mlp.down_proj = nn.Linear(96, 63)


def _renamed(mlp: Any) -> None:
    mlp.down = mlp.down_proj
    del mlp.down_proj


def _subclassed(mlp: Any) -> None:
    class Other(nn.Linear):
        pass

    mlp.down_proj.__class__ = Other


def _wrapped(mlp: Any) -> None:
    mlp.down_proj = nn.Sequential(mlp.down_proj)


def _on_meta(mlp: Any) -> None:
    mlp.down_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed_weight, "the recipe was made for a weight with fingerprint"),
        (_another_shape, "the recipe was made for a weight of shape (64, 96)"),
        (_renamed, "the recipe was made for another model: this one has no"),
        (_wrapped, "the recipe was made for another model: this one has no"),
        (_subclassed, "is a Other, not a plain nn.Linear"),
        (_on_meta, "is on the meta device, without values to quantize"),
    ],
)
def test_a_recipe_for_other_weights_changes_nothing(
    model: Any, recipe: Recipe, change: Callable[[Any], None], message: str
) -> None:
    change(model.get_decoder().layers[1].mlp)
    before = kinds(model)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        quantize_(model, masquant_config(recipe))
    assert "layers.1.mlp.down_proj" in str(error.value)
    assert kinds(model) == before and "forward" not in model.__dict__


def test_one_config_meets_restored_weights_anew(model, recipe):
    """What came back since is quantized as the rest was, and nothing else is."""
    config = masquant_config(recipe)
    original = copy.deepcopy(model.get_decoder().layers[0].mlp.up_proj)
    quantize_(model, config)
    whole = copy.deepcopy(model)
    kept = model.get_decoder().layers[0].mlp.up_proj
    kept.__class__ = nn.Linear
    kept.weight = original.weight
    quantize_(model, config)
    assert_same_state(model, whole)


def test_overrides_narrow_and_nothing_else(model, recipe):
    quantize_(model, masquant_config(recipe, include=LAST, exclude="*.mlp.*"))
    found = quantized(model)
    assert len(found) == 4 and all(".1.self_attn." in name for name in found)
    # The rest can follow; one router serves both.
    quantize_(model, masquant_config(recipe, exclude=[LAST]))
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(ValueError, match="matches no linear of the model"):
        quantize_(tiny_models.qwen25_vl(), masquant_config(recipe, include="nope"))


def test_filter_fn_is_respected(model, recipe):
    config = masquant_config(recipe)
    quantize_(model, config, filter_fn=lambda _, name: name.endswith("1.mlp.up_proj"))
    (name,) = quantized(model)
    assert name.endswith("layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": "observe"}, ValueError, "unknown step 'observe': choose one of"),
        ({}, ValueError, "unknown step None: choose one of ['prepare', 'convert',"),
        ({"step": "prepare", "alpha": 2}, ValueError, "alpha must lie in 0..1, got 2"),
        ({"step": "prepare", "scheme": "w5a5"}, ValueError, "unknown scheme 'w5a5'"),
        ({"step": "convert", "recipe": "nowhere"}, FileNotFoundError, "no recipe file"),
        (
            {"base_config": "convert", "step": "w8a8"},
            TypeError,
            "base_config must be a config of torchao's, got 'convert': give all else by",
        ),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        MASQuantConfig(**options)


def test_a_step_may_stand_alone_in_the_first_place():
    assert MASQuantConfig("convert", method="rtn") == MASQuantConfig(
        step="convert", method="rtn"
    )


def test_a_recipe_is_for_converting(recipe):
    with pytest.raises(ValueError, match="a recipe is for step='convert'"):
        MASQuantConfig(step="prepare", recipe=recipe)


def test_handler_without_quantize_says_so(recipe):
    handler = _QUANTIZE_CONFIG_HANDLER[MASQuantConfig]
    message = "MASQuantConfig works through torchao.quantization.quantize_"
    with pytest.raises(RuntimeError, match=message):
        handler(nn.Linear(2, 2), masquant_config(recipe))


def test_placeholders_do_not_take_the_default_dtype(model):
    """from_pretrained builds a bfloat16 model under a bfloat16 default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantize_(model, MASQuantConfig(step="prepare_for_loading"))
    finally:
        torch.set_default_dtype(default)
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    assert weight.scale.dtype == weight.act_pre_scale.dtype == torch.float32


def test_rounding_does_not_take_the_default_dtype(model):
    default = torch.get_default_dtype()
    config = MASQuantConfig(step="convert", method="rtn")
    other = copy.deepcopy(model)
    quantize_(other, config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantize_(model, config)
    finally:
        torch.set_default_dtype(default)
    assert_same_state(model, other)


def test_a_dense_state_is_refused(model, recipe):
    quantize_(model, masquant_config(recipe))
    with pytest.raises(
        RuntimeError, match="is quantized, the checkpoint's weight is n"
    ):
        model.load_state_dict(tiny_models.qwen25_vl().state_dict(), assign=True)
