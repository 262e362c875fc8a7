# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``quantize_`` with a recipe and in torchao's steps, and what they refuse."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantLinear,
    MASQuantTensor,
    calibrate,
    masquant_config,
)
from torchao_masquant.calibration.session import MASQuantObservedLinear
from torchao_masquant.options import METHODS
from torchao_masquant.testing import digits

LAST = r"re:model\.(language_model\.)?layers\.3\..*"

#: Nothing to choose between, where all of a model is solved for.
ONE_SOLUTION = {"alpha": 0.5, "separation": 1.0}


@pytest.fixture
def model():
    return digits.load_model("outliers")


@pytest.fixture(scope="module")
def samples():
    return digits.calibration_samples(8)


@pytest.fixture(scope="module")
def recipe(samples):
    return calibrate(
        digits.load_model("outliers"), samples, progress=False, **ONE_SOLUTION
    )


def _kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def _equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert type(tensor) is type(other), name
        if isinstance(tensor, MASQuantTensor):
            names, attributes = tensor.__tensor_flatten__()
            assert (names, attributes) == other.__tensor_flatten__()
            for inner in names:
                assert torch.equal(getattr(tensor, inner), getattr(other, inner)), name
        else:
            assert torch.equal(tensor, other), name


def _logits(model):
    with torch.no_grad():
        return model(**digits.prompt("both")).logits


def test_one_line_quantizes_the_decoder_alone(model, recipe, tmp_path):
    recipe.save(tmp_path / "recipe.safetensors")
    other = copy.deepcopy(model)
    names = list(model.state_dict())
    quantize_(model, masquant_config(recipe))
    quantize_(other, masquant_config(tmp_path / "recipe.safetensors"))
    _equal_states(model, other)
    assert list(model.state_dict()) == names
    quantized = {n for n, m in model.named_modules() if type(m) is MASQuantLinear}
    assert quantized == set(recipe.layers)
    decoder = {id(m) for m in model.get_decoder().layers.modules()}
    assert all(id(model.get_submodule(name)) in decoder for name in quantized)
    assert len(quantized) == 4 * 7
    assert not any(model.get_submodule(n).weight.requires_grad for n in quantized)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a6"])
def test_steps_give_what_the_recipe_gives(model, samples, method, scheme):
    options = {"method": method, "scheme": scheme, "include": LAST}
    other = copy.deepcopy(model)
    recipe = calibrate(other, samples, progress=False, **options)
    quantize_(other, masquant_config(recipe))

    quantize_(model, MASQuantConfig(step="prepare", **options))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    quantize_(model, MASQuantConfig(step="convert", **options))
    _equal_states(model, other)
    assert torch.equal(_logits(model), _logits(other))
    assert ("forward" in model.__dict__) == ("forward" in other.__dict__)


def test_observed_models_answer_as_before(model, samples):
    before = _logits(model)
    quantize_(model, MASQuantConfig(step="prepare"))
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        (None, {}, "has no observed linear to convert"),
        ({}, {}, "no calibration data ran through the model"),
        ({"method": "rtn"}, {}, "method 'masquant' needs covariances"),
    ],
)
def test_convert_out_of_order(model, first, options, message):
    if first is not None:
        quantize_(model, MASQuantConfig(step="prepare", **first))
    before = _kinds(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_(model, MASQuantConfig(step="convert", **options))
    assert _kinds(model) == before
    _logits(model)


def test_prepare_twice(model):
    quantize_(model, MASQuantConfig(step="prepare"))
    with pytest.raises(ValueError, match="is a MASQuantObservedLinear, not a plain"):
        quantize_(model, MASQuantConfig(step="prepare"))


def _changed_weight(model):
    model.get_decoder().layers[3].mlp.down_proj.weight.data[5, 5] += 1


def _another_shape(model):
    model.get_decoder().layers[3].mlp.down_proj = nn.Linear(768, 255)


def _renamed(model):
    mlp = model.get_decoder().layers[3].mlp
    mlp.down = mlp.down_proj
    del mlp.down_proj


def _subclassed(model):
    class Other(nn.Linear):
        pass

    model.get_decoder().layers[3].mlp.down_proj.__class__ = Other


def _on_meta(model):
    model.get_decoder().layers[3].mlp.down_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed_weight, "the recipe was made for a weight with fingerprint"),
        (_another_shape, "the recipe was made for a weight of shape (256, 768)"),
        (_renamed, "the recipe was made for another model: this one has no"),
        (_subclassed, "is a Other, not a plain nn.Linear"),
        (_on_meta, "is on the meta device, without values to quantize"),
    ],
)
def test_a_recipe_for_other_weights_changes_nothing(model, recipe, change, message):
    change(model)
    before = _kinds(model)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        quantize_(model, masquant_config(recipe))
    assert "layers.3.mlp.down_proj" in str(error.value)
    assert _kinds(model) == before and "forward" not in model.__dict__


def test_quantized_already(model, recipe):
    quantize_(model, masquant_config(recipe))
    with pytest.raises(ValueError, match="q_proj is quantized already"):
        quantize_(model, masquant_config(recipe))


def test_one_config_serves_two_models(recipe):
    config = masquant_config(recipe)
    first, second = digits.load_model("outliers"), digits.load_model("outliers")
    quantize_(first, config)
    quantize_(second, config)
    _equal_states(first, second)
    routers = {
        id(m.router)
        for model in (first, second)
        for m in model.modules()
        if isinstance(m, MASQuantLinear)
    }
    assert len(routers) == 2


def test_one_config_meets_restored_weights_anew(model, recipe):
    """What came back since is quantized as the rest was, and nothing else is."""
    config = masquant_config(recipe)
    quantize_(model, config)
    whole = copy.deepcopy(model)
    kept = model.get_decoder().layers[0].mlp.up_proj
    original = digits.load_model("outliers").get_decoder().layers[0].mlp.up_proj
    kept.__class__ = nn.Linear
    kept.weight = original.weight
    quantize_(model, config)
    _equal_states(model, whole)


def test_overrides_narrow_and_nothing_else(model, recipe):
    quantize_(model, masquant_config(recipe, include=LAST, exclude="*.mlp.*"))
    quantized = [n for n, m in model.named_modules() if type(m) is MASQuantLinear]
    assert len(quantized) == 4 and all(".3.self_attn." in n for n in quantized)
    # The rest can follow; one router serves both.
    quantize_(model, masquant_config(recipe, exclude=[LAST]))
    assert torch.isfinite(_logits(model)).all()
    with pytest.raises(TypeError, match="not scheme: what else there is"):
        masquant_config(recipe, scheme="w8a8")
    with pytest.raises(ValueError, match="matches no linear of the model"):
        quantize_(
            digits.load_model("outliers"), masquant_config(recipe, include="nope")
        )


def test_filter_fn_is_respected(model, recipe):
    quantize_(
        model,
        masquant_config(recipe),
        filter_fn=lambda module, name: name.endswith("layers.3.mlp.up_proj"),
    )
    quantized = [m for m in model.modules() if type(m) is MASQuantLinear]
    assert quantized == [model.get_decoder().layers[3].mlp.up_proj]


def test_as_an_entry_of_fqn_to_config(model, recipe):
    pattern = r"re:model\.(language_model\.)?layers\.3\..*proj"
    config = FqnToConfig(OrderedDict({pattern: masquant_config(recipe)}))
    quantize_(model, config, filter_fn=None)
    quantized = [n for n, m in model.named_modules() if type(m) is MASQuantLinear]
    assert len(quantized) == 7 and all(".layers.3." in n for n in quantized)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": "observe"}, ValueError, "unknown step 'observe': choose one of"),
        ({"step": "prepare", "alpha": 2}, ValueError, "alpha must lie in 0..1, got 2"),
        ({"step": "prepare", "scheme": "w5a5"}, ValueError, "unknown scheme 'w5a5'"),
        ({"step": "convert", "recipe": "nowhere"}, FileNotFoundError, "no recipe file"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MASQuantConfig(**options)


def test_a_recipe_is_for_converting(recipe):
    with pytest.raises(ValueError, match="a recipe is for step='convert'"):
        MASQuantConfig(step="prepare", recipe=recipe)


def test_handler_without_quantize_says_so(recipe):
    from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER

    handler = _QUANTIZE_CONFIG_HANDLER[MASQuantConfig]
    with pytest.raises(
        RuntimeError, match="works through torchao.quantization.quantize_"
    ):
        handler(nn.Linear(2, 2), masquant_config(recipe))


@pytest.mark.parametrize("method", ["masquant", "smoothquant"])
def test_a_saved_state_loads_bit_identical(samples, method, tmp_path):
    model = digits.load_model("outliers")
    quantize_(
        model,
        masquant_config(
            calibrate(model, samples, method=method, progress=False, **ONE_SOLUTION)
        ),
    )
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = digits.load_model("plain")
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading"))
    assert all(
        isinstance(m.weight, MASQuantTensor)
        for m in loaded.get_decoder().layers.modules()
        if isinstance(m, nn.Linear)
    )
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.load_state_dict(state, assign=True)
    _equal_states(model, loaded)
    assert torch.equal(_logits(model), _logits(loaded))


def test_placeholders_do_not_take_the_default_dtype():
    """from_pretrained builds a bfloat16 model under a bfloat16 default."""
    default = torch.get_default_dtype()
    model = digits.load_model("plain")
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantize_(model, MASQuantConfig(step="prepare_for_loading"))
    finally:
        torch.set_default_dtype(default)
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    assert weight.scale.dtype == weight.act_pre_scale.dtype == torch.float32


def test_a_state_of_other_modalities_is_refused(model, samples, recipe):
    state = copy.deepcopy(model)
    quantize_(state, masquant_config(recipe))
    quantize_(model, MASQuantConfig(step="prepare_for_loading", base_modality="vision"))
    with pytest.raises(RuntimeError, match="was quantized for the modalities"):
        model.load_state_dict(state.state_dict(), assign=True)
    with pytest.raises(
        RuntimeError, match="is quantized, the checkpoint's weight is not"
    ):
        model.load_state_dict(digits.load_model("outliers").state_dict(), assign=True)


def test_observed_linears_are_linears_again_after_convert(model, samples):
    quantize_(model, MASQuantConfig(step="prepare", include=LAST))
    assert any(isinstance(m, MASQuantObservedLinear) for m in model.modules())
    for sample in samples:
        model(**sample)
    quantize_(model, MASQuantConfig(step="convert"))
    assert not any(isinstance(m, MASQuantObservedLinear) for m in model.modules())
    assert not any(hasattr(m, "session") for m in model.modules())
