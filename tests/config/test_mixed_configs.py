# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Several configs for one model, torchao's steps and loading: what must not differ."""

import copy
import dataclasses
import json
import re

import pytest
import tiny_models
import torch
from checkpoints import assert_same_state
from linear_oracle import assert_routed, linears_of, recorded
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantLinear,
    MASQuantTensor,
    Recipe,
    calibrate,
    masquant_config,
    token_modalities,
)
from torchao_masquant.calibration.session import MASQuantObservedLinear
from torchao_masquant.options import METHODS, SolverOptions

NAMES = ("text", "vision", "audio")
FIRST = r"re:model\.(language_model\.)?layers\.0\..*"
SECOND = r"re:model\.(language_model\.)?layers\.1\..*"


def _pattern(layer):
    return layer + "_proj"


@pytest.fixture
def model():
    return tiny_models.omni_thinker()


@pytest.fixture(scope="module")
def samples():
    return tiny_models.samples(audio=True)


def _kinds(model):
    return {name: type(m) for name, m in model.named_modules()}


def _run(model, samples):
    with torch.no_grad():
        for sample in samples:
            model(**sample)


def _assert_routes(model, sample, linears):
    """All linears ran, and each that tells modalities apart was told them."""
    with recorded(model) as calls, torch.no_grad():
        model(**sample)
    assert len(calls) == linears
    routed = [call for call in calls if call.linear.routed]
    assert_routed(routed, tiny_models.true_ids(model, sample))


# Different configs for different layers.


@pytest.mark.parametrize("methods", [("rtn", "masquant"), ("masquant", "rtn")])
def test_two_recipes_one_after_the_other(model, samples, methods):
    """The first may need no routing, the second one does."""
    first, second = (tiny_models.recipe_of(model, method=m, rank=2) for m in methods)
    quantize_(model, masquant_config(first, include=FIRST))
    quantize_(model, masquant_config(second, exclude=FIRST))
    assert len(linears_of(model)) == 14
    _assert_routes(model, samples[0], 14)


def test_two_recipes_in_one_fqn_to_config(model, samples):
    recipes = [
        tiny_models.recipe_of(model, scheme=scheme, rank=2)
        for scheme in ("w4a8", "w8a8")
    ]
    configs = {
        _pattern(layer): masquant_config(recipe, include=layer)
        for layer, recipe in zip((FIRST, SECOND), recipes)
    }
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    bits = {n: m.weight.weight_bits for n, m in linears_of(model).items()}
    assert bits == {n: 4 if ".layers.0." in n else 8 for n in recipes[0].layers}
    routers = {id(m.router) for m in linears_of(model).values()}
    assert len(routers) == 1
    _assert_routes(model, samples[0], 14)


# As in a config for q, k, v and another for the rest: the linears take turns.
TURNS = {
    r"re:model\.(language_model\.)?layers.*self_attn.[qkv]_proj": {"scheme": "w8a8"},
    r"re:model\.(language_model\.)?layers.*(o|gate|up|down)_proj": {
        "scheme": "w4a6",
        "rank": 3,
    },
}


@pytest.mark.parametrize("second_method", ["masquant", "rtn"])
def test_steps_with_two_configs_that_take_turns(model, samples, second_method):
    options = copy.deepcopy(TURNS)
    list(options.values())[1]["method"] = second_method
    expected = copy.deepcopy(model)
    for pattern, chosen in options.items():
        recipe = tiny_models.recipe_of(copy.deepcopy(model), include=pattern, **chosen)
        quantize_(expected, masquant_config(recipe))

    for step in ("prepare", "convert"):
        configs = {
            pattern: MASQuantConfig(step=step, include=pattern, **chosen)
            for pattern, chosen in options.items()
        }
        quantize_(model, FqnToConfig(configs), filter_fn=None)
        if step == "prepare":
            _run(model, samples)
    assert not any(isinstance(m, MASQuantObservedLinear) for m in model.modules())
    assert_same_state(model, expected)
    _assert_routes(model, samples[1], 14)


def test_one_convert_for_two_prepares(model, samples):
    quantize_(model, MASQuantConfig(step="prepare", include=FIRST))
    quantize_(model, MASQuantConfig(step="prepare", include=SECOND))
    _run(model, samples)
    quantize_(model, MASQuantConfig(step="convert"))
    assert len(linears_of(model)) == 14
    expected = tiny_models.quantized(tiny_models.omni_thinker(), rank=0.05)
    assert_same_state(model, expected)


def test_the_part_prepared_last_is_converted_first(model, samples):
    for include in (FIRST, SECOND):
        quantize_(model, MASQuantConfig(step="prepare", include=include))
    _run(model, samples)
    for index, layer in ((1, SECOND), (0, FIRST)):
        config = FqnToConfig({_pattern(layer): MASQuantConfig(step="convert")})
        quantize_(model, config, filter_fn=None)
        assert sum(f".layers.{index}." in name for name in linears_of(model)) == 7
    _assert_routes(model, samples[0], 14)


def test_steps_of_a_plain_model_with_two_configs():
    """One router: token_modalities speaks for all observed linears."""
    model = tiny_models.PlainModel()
    for name in ("first", "second"):
        quantize_(model, MASQuantConfig(step="prepare", modalities=NAMES, include=name))
    x = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(12).expand(3, -1) % 3
    with token_modalities(model, ids):
        model(x)
    quantize_(model, MASQuantConfig(step="convert"))
    assert type(model.first) is type(model.second) is MASQuantLinear


def test_a_part_that_holds_the_decoder_is_quantized_as_the_whole_is(model):
    if model.get_decoder() is model.model:
        pytest.skip("this release of transformers has no part around the decoder")
    recipe = tiny_models.recipe_of(model, rank=2)
    whole = copy.deepcopy(model)
    quantize_(model.model, masquant_config(recipe))
    quantize_(whole, masquant_config(recipe))
    assert_same_state(model, whole)


@pytest.mark.parametrize("recipe", [None, 3, {}])
def test_a_recipe_is_asked_for(recipe):
    with pytest.raises(TypeError) as error:
        masquant_config(recipe)
    assert str(error.value) == (
        "masquant_config takes a recipe from calibrate(), or the path of one, got a "
        f"{type(recipe).__name__}."
    )


def test_overrides_message():
    recipe = tiny_models.recipe_of(tiny_models.PlainModel(), rank=1)
    with pytest.raises(TypeError) as error:
        masquant_config(recipe, alpha=0.2, scheme="w8a8", include="first")
    assert str(error.value) == (
        "masquant_config takes include and exclude beside the recipe, not alpha, scheme: "
        "what else there is, the recipe was made for; calibrate again to change it."
    )


OPTIONS = {
    "alpha": "auto",
    "separation": 0.25,
    "rank": "auto",
    "group_size": 16,
    "hadamard_size": 2,
    "shift": False,
    "rounding": "nearest",
    "clip": True,
    "low_rank_bits": 8,
    "modality_weights": {"text": 1.0, "audio": 0.25},
}


def test_every_option_through_json():
    """Text and back, as transformers writes it into a config.json."""
    step = "prepare_for_loading"
    config = MASQuantConfig(
        step=step, scheme="w4a6", modalities=NAMES, exclude=["a", "b"], **OPTIONS
    )
    text = json.dumps(config_to_dict(config))
    other = config_from_dict(json.loads(text))
    assert type(other) is MASQuantConfig
    assert dataclasses.asdict(other) == dataclasses.asdict(config)
    assert other.options == config.options == SolverOptions("w4a6", **OPTIONS)
    # What is None stays so, and means what it meant.
    plain = MASQuantConfig(step=step)
    other = config_from_dict(json.loads(json.dumps(config_to_dict(plain))))
    assert other.options == SolverOptions()


def test_a_config_takes_every_option_of_the_solver(tmp_path):
    """And a recipe's take the place of those that it is given."""
    for field in dataclasses.fields(SolverOptions):
        assert getattr(MASQuantConfig(step="prepare"), field.name) == getattr(
            SolverOptions(), field.name
        )
    options = OPTIONS | {"group_size": 4, "scheme": "w4a8"}
    recipe = tiny_models.recipe_of(tiny_models.PlainModel(), **options)
    recipe.save(tmp_path / "x")
    loaded = Recipe.load(tmp_path / "x")
    assert loaded.options == recipe.options == SolverOptions(**options)
    config = masquant_config(tmp_path / "x")
    assert config.options == recipe.options
    model = tiny_models.PlainModel()
    quantize_(model, config)
    weight = model.first.weight.data
    assert (weight.group_size, weight.low_rank_bits) == (4, 8)
    assert weight.hadamard_size == 2
    assert weight.act_shift is None and weight.modality_bias is not None


def test_a_float_that_json_cannot_tell_from_an_int():
    """``rank=1.0`` is all of the rank, ``rank=1`` is one."""
    for rank in (1, 1.0):
        config = MASQuantConfig(step="prepare", rank=rank)
        other = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
        assert type(other.rank) is type(rank)


# torchao's steps.


@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_calibrate_with_padding_and_no_grad(model, samples, method):
    """Padded batches, in training mode, without no_grad: still the same bits."""
    padded = [
        tiny_models.batch(
            [tiny_models.BOS, *tiny_models.words(8, s), "image", "audio"],
            [tiny_models.BOS, "video", "audio", *tiny_models.words(3, s + 9)],
            seed=s,
            audio=True,
        )
        for s in range(3)
    ]
    assert all((p["attention_mask"] == 0).any() for p in padded)
    options = {"scheme": "w4a4", "method": method, "rank": 4, "alpha": 0.7}
    expected = copy.deepcopy(model)
    recipe = calibrate(expected, padded, progress=False, **options)
    quantize_(expected, masquant_config(recipe))
    quantize_(model, MASQuantConfig(step="prepare", **options))
    for sample in padded:
        model(**sample)
    quantize_(model, MASQuantConfig(step="convert", **options))
    assert_same_state(model, expected)
    assert ("forward" in vars(model)) == ("forward" in vars(expected))
    assert not any(hasattr(m, "session") for m in model.modules())
    with torch.no_grad():
        first, second = model(**padded[0]).logits, expected(**padded[0]).logits
    assert torch.equal(first, second)


def test_convert_too_early_leaves_a_usable_model(model, samples):
    quantize_(model, MASQuantConfig(step="prepare"))
    config = MASQuantConfig(step="convert")
    kinds = _kinds(model)
    with pytest.raises(ValueError) as error:
        quantize_(model, config)
    assert str(error.value) == "no calibration data ran through the model."
    assert _kinds(model) == kinds
    # Data of one modality is not enough either.
    words = tiny_models.batch(tiny_models.words(9), audio=True)
    _run(model, [words])
    with pytest.raises(ValueError, match="brings no vision token"):
        quantize_(model, config)
    assert _kinds(model) == kinds
    _run(model, samples)
    quantize_(model, config)
    assert len(linears_of(model)) == 14


# Loading.


def _state(tmp_path, **options):
    model = tiny_models.quantized(tiny_models.omni_thinker(), **options)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    return model, torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_loads_from_disk(samples, tmp_path, method):
    """Into placeholders of another scheme, too: a checkpoint brings its own."""
    model, state = _state(tmp_path, method=method, scheme="w4a6", rank=3)
    loaded = tiny_models.omni_thinker(seed=5)
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", scheme="w8a8"))
    loaded.load_state_dict(state, assign=True)
    assert_same_state(loaded, model)
    with torch.no_grad():
        for sample in samples:
            assert torch.equal(loaded(**sample).logits, model(**sample).logits)
    for name, linear in linears_of(loaded).items():
        spared = SolverOptions(method=method).spares(name)
        assert linear.routed == (method.startswith("mas") and not spared), name


def test_a_state_loads_from_the_meta_device(samples, tmp_path):
    model, state = _state(tmp_path, rank=3)
    loaded = tiny_models.omni_thinker(seed=5).to("meta")
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading"))
    assert all(m.weight.is_meta for m in linears_of(loaded).values())
    loaded.load_state_dict(state, assign=True)
    # Buffers that are in no state_dict (rotary frequencies): from_pretrained makes
    # them anew, as here.
    for name, buffer in model.named_buffers():
        if name not in state:
            parent, _, key = name.rpartition(".")
            loaded.get_submodule(parent)._buffers[key] = buffer.clone()
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert_same_state(loaded, model)
    with torch.no_grad():
        for sample in samples:
            assert torch.equal(loaded(**sample).logits, model(**sample).logits)


def test_other_modalities_are_refused(tmp_path):
    _, state = _state(tmp_path, rank=3)
    for options in (
        {"base_modality": "audio"},
        {"modalities": ("text", "vision")},
        {"modalities": ("text", "audio", "vision")},
    ):
        loaded = tiny_models.omni_thinker(seed=5)
        quantize_(loaded, MASQuantConfig(step="prepare_for_loading", **options))
        with pytest.raises(RuntimeError) as error:
            loaded.load_state_dict(state, assign=True)
        assert (
            "the checkpoint was quantized for the modalities ('text', 'vision', "
            "'audio'), this model for " in str(error.value)
        )


def test_several_configs_for_loading(samples, tmp_path):
    """Plain token_modalities and input_ids alike reach linears of both."""
    model, state = _state(tmp_path, rank=3)
    loaded = tiny_models.omni_thinker(seed=5)
    for include in (FIRST, SECOND):
        quantize_(loaded, MASQuantConfig(step="prepare_for_loading", include=include))
    loaded.load_state_dict(state, assign=True)
    assert len({id(m.router) for m in linears_of(loaded).values()}) == 1
    with torch.no_grad():
        assert torch.equal(loaded(**samples[0]).logits, model(**samples[0]).logits)


def test_loading_beside_linears_that_needed_no_routing(samples, tmp_path):
    model, state = _state(tmp_path, rank=3)
    loaded = tiny_models.omni_thinker()
    rtn = tiny_models.recipe_of(loaded, method="rtn")
    quantize_(loaded, masquant_config(rtn, include=FIRST))
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", include=SECOND))
    second = {k: v for k, v in state.items() if re.match(SECOND.removeprefix("re:"), k)}
    loaded.load_state_dict(second, assign=True, strict=False)
    _assert_routes(loaded, samples[0], 14)


def test_a_linear_under_two_names_is_quantized_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = nn.ModuleList([self.one])

        def forward(self, x):
            return self.last(torch.tanh(self.again[0](self.one(x))))

    torch.manual_seed(0)
    x = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(10) > 5).long().expand(2, -1)
    options = {"modalities": ("text", "vision"), "rank": 2}
    model = Twice()
    prepared = copy.deepcopy(model)
    recipe = calibrate(
        model, [{"x": x, "modality_ids": ids}], progress=False, **options
    )
    assert list(recipe.layers) == ["one", "last"]
    quantize_(model, masquant_config(recipe))
    assert model.one is model.again[0] and type(model.one) is MASQuantLinear
    quantize_(prepared, MASQuantConfig(step="prepare", **options))
    with token_modalities(prepared, ids):
        prepared(x)
    quantize_(prepared, MASQuantConfig(step="convert", **options))
    assert_same_state(prepared, model)
    with token_modalities(model, ids), token_modalities(prepared, ids):
        assert torch.equal(model(x), prepared(x))


def test_a_compiled_model_is_quantized_as_the_model_in_it(model, samples):
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    recipe = calibrate(compiled, samples, rank=2, progress=False)
    quantize_(compiled, masquant_config(recipe))
    quantize_(model, masquant_config(recipe))
    assert_same_state(compiled._orig_mod, model)


@pytest.mark.parametrize("context", ["inference_mode", "autocast", "default dtype"])
def test_steps_under_what_surrounds_them(model, samples, context):
    """inference_mode and a bfloat16 default change no bit, autocast no statistic's type."""
    expected = copy.deepcopy(model)
    recipe = calibrate(expected, samples, rank=2, progress=False)
    if context == "inference_mode":
        with torch.inference_mode():
            found = calibrate(model, samples, rank=2, progress=False)
    elif context == "default dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = calibrate(model, samples, rank=2, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = calibrate(model, samples, rank=2, progress=False)
    for name, layer in recipe.layers.items():
        for key, tensor in layer.tensors().items():
            other = found.layers[name].tensors()[key]
            assert tensor.dtype == other.dtype and not other.is_inference()
            # The model itself rounds otherwise under autocast.
            assert context == "autocast" or torch.equal(tensor, other), (name, key)
    # What came of it can be used outside.
    quantize_(model, masquant_config(found))
    _assert_routes(model, samples[0], 14)


def test_data_in_and_out_of_inference_mode(model, samples):
    expected = copy.deepcopy(model)
    for net, first in ((model, torch.inference_mode), (expected, torch.no_grad)):
        quantize_(net, MASQuantConfig(step="prepare", rank=2))
        with first():
            for sample in samples[:2]:
                net(**sample)
        _run(net, samples[2:])
        quantize_(net, MASQuantConfig(step="convert", rank=2))
    assert_same_state(model, expected)


def test_a_recipe_object_survives_its_config(model):
    """Quantizing takes nothing away from the recipe."""
    recipe = tiny_models.recipe_of(model, rank=2)
    before = copy.deepcopy(recipe)
    quantize_(model, masquant_config(recipe))
    assert isinstance(recipe, Recipe)
    for name, layer in before.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, recipe.layers[name].tensors()[key])
    for p in model.parameters():
        if isinstance(p, MASQuantTensor):
            p.data.act_pre_scale.fill_(0)
    for name, layer in before.layers.items():
        assert torch.equal(layer.smoothing_factor, recipe.layers[name].smoothing_factor)
    assert isinstance(model.lm_head, nn.Linear)
