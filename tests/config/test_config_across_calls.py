# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One config in several calls of ``quantize_``: each call does what it says then.

torchao's own examples prepare with a config, assign to its ``step`` and convert with it.
Nothing of a call is kept under the config; what is left of an interrupted one is finished
by the next.
"""

import copy
import dataclasses
import threading
from collections import OrderedDict
from typing import Any, Callable

import expert_models
import pytest
import tiny_models
import torch
from checkpoints import assert_same_state
from torch import nn
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

from torchao_masquant import (
    MASQuantConfig,
    MASQuantExperts,
    MASQuantLinear,
    Recipe,
    calibrate,
    masquant_config,
    token_modalities,
)

FAST = {"alpha": 0.5, "separation": 1.0}


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen25_vl()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_models.recipe_of(tiny_models.qwen25_vl(), **FAST)


def run(model: Any) -> None:
    with torch.no_grad():
        for sample in tiny_models.samples(audio=False):
            model(**sample)


def quantized_names(model: nn.Module) -> list[str]:
    kinds = (MASQuantLinear, MASQuantExperts)
    return [n for n, m in model.named_modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(
    "step", ["convert", "CONVERT", QuantizationStep.CONVERT], ids=str
)
def test_the_step_of_a_config_is_assigned_to(model, recipe, step):
    config = MASQuantConfig(step="prepare", **FAST)
    quantize_(model, config)
    run(model)
    config.step = step
    quantize_(model, config)
    expected = tiny_models.quantized(tiny_models.qwen25_vl(), recipe)
    assert_same_state(model, expected)
    assert quantized_names(model) == list(recipe.layers)


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, dataclasses.replace],
    ids=["copy", "deepcopy", "replace"],
)
def test_a_copy_converts_what_another_prepared(model, again):
    config = MASQuantConfig(step="prepare", method="rtn", scheme="w8a8")
    quantize_(model, config)
    run(model)
    other = again(config)
    other.step = "convert"
    quantize_(model, other)
    assert len(quantized_names(model)) == 14
    assert config.step == "prepare"


def test_configs_are_equal_by_what_they_say(recipe):
    assert MASQuantConfig(step="convert") == MASQuantConfig(step="CONVERT")
    assert MASQuantConfig(step="convert") != MASQuantConfig(step="prepare")
    assert masquant_config(recipe) == masquant_config(copy.deepcopy(recipe))
    other = copy.deepcopy(recipe)
    next(iter(other.layers.values())).smoothing_factor[0, 0] += 1
    assert masquant_config(recipe) != masquant_config(other)


def test_one_config_prepares_and_converts_two_models():
    config = MASQuantConfig(step="prepare", **FAST)
    models = [tiny_models.qwen25_vl(seed=0), tiny_models.qwen25_vl(seed=1)]
    for model in models:
        quantize_(model, config)
        run(model)
    config.step = "convert"
    for seed, model in enumerate(models):
        quantize_(model, config)
        expected = tiny_models.quantized(tiny_models.qwen25_vl(seed=seed), **FAST)
        assert_same_state(model, expected)


def test_the_same_config_twice_is_refused(recipe):
    for config in (
        MASQuantConfig(step="convert", method="rtn"),
        MASQuantConfig(step="prepare"),
        MASQuantConfig(step="prepare_for_loading"),
        masquant_config(recipe),
    ):
        model = tiny_models.qwen25_vl()
        quantize_(model, config)
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="quantized (or observed )?already"):
            quantize_(model, config)
        assert [type(m) for m in model.modules()] == kinds


def test_changed_options_count(model):
    config = MASQuantConfig(step="convert", method="rtn", scheme="w8a8")
    quantize_(model, config)
    config.scheme, config.group_size = "W4A16", 16
    other = tiny_models.qwen25_vl()
    quantize_(other, config)
    weight = other.model.language_model.layers[0].mlp.up_proj.weight
    assert (weight.weight_bits, weight.act_bits, weight.group_size) == (4, 16, 16)


def test_changed_options_are_checked(model):
    config = MASQuantConfig(step="convert", method="rtn")
    for name, value, message in (
        ("scheme", "w5a5", "unknown scheme 'w5a5'"),
        ("step", "observe", "unknown step 'observe'"),
        ("method", "gptq", "unknown method 'gptq'"),
    ):
        changed = copy.copy(config)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=message):
            quantize_(model, changed)
    assert not quantized_names(model)


def test_a_recipes_options_are_not_changed_without_a_word(model, recipe):
    config = masquant_config(recipe)
    config.scheme = "w8a8"
    with pytest.raises(ValueError, match="its recipe was made for 'w4a8': calibrate"):
        quantize_(model, config)
    assert not quantized_names(model)
    config.scheme = "w4a8"
    config.exclude = "*.mlp.*"
    quantize_(model, config)
    assert len(quantized_names(model)) == 8


def test_another_recipe_is_assigned_to(model, recipe, tmp_path):
    other = tiny_models.recipe_of(tiny_models.qwen25_vl(), scheme="w8a8", **FAST)
    other.save(tmp_path / "other.safetensors")
    config = masquant_config(recipe)
    config.recipe = tmp_path / "other.safetensors"
    quantize_(model, config)
    assert_same_state(model, tiny_models.quantized(tiny_models.qwen25_vl(), other))


def test_a_recipe_is_read_once(model, recipe, tmp_path):
    recipe.save(tmp_path / "recipe.safetensors")
    config = masquant_config(tmp_path / "recipe.safetensors")
    (tmp_path / "recipe.safetensors").unlink()
    quantize_(model, config)
    assert quantized_names(model) == list(recipe.layers)


class _Interruption:
    """A ``filter_fn`` that takes the decoder's linears, and stops before one of them."""

    def __init__(self, error: type[BaseException], after: int):
        self.error, self.left = error, after

    def __call__(self, module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or ".language_model." not in name:
            return False
        if not self.left:
            raise self.error("stopped")
        self.left -= 1
        return True


def _ready(model: Any, config: MASQuantConfig) -> None:
    if config.step == "convert" and config.recipe is None and config.method != "rtn":
        quantize_(model, dataclasses.replace(config, step="prepare"))
        run(model)


@pytest.mark.parametrize("error, after", [(KeyboardInterrupt, 1), (MemoryError, 5)])
@pytest.mark.parametrize(
    "make",
    [
        lambda recipe: MASQuantConfig(step="prepare", **FAST),
        lambda recipe: MASQuantConfig(step="convert", **FAST),
        lambda recipe: MASQuantConfig(step="convert", method="rtn"),
        lambda recipe: MASQuantConfig(step="prepare_for_loading"),
        masquant_config,
    ],
    ids=["prepare", "convert", "rounding", "loading", "recipe"],
)
def test_the_next_call_finishes_an_interrupted_one(
    recipe: Recipe,
    make: Callable[[Recipe], MASQuantConfig],
    after: int,
    error: type[BaseException],
) -> None:
    config = make(recipe)
    whole, model = tiny_models.qwen25_vl(), tiny_models.qwen25_vl()
    for each in (whole, model):
        _ready(each, config)
    quantize_(whole, config)
    with pytest.raises(error):
        quantize_(model, config, filter_fn=_Interruption(error, after))
    kinds = [type(m) for m in model.modules()]
    assert kinds != [type(m) for m in whole.modules()]
    quantize_(model, make(recipe))
    assert [type(m) for m in model.modules()] == [type(m) for m in whole.modules()]
    if config.step == "prepare":
        for each in (whole, model):
            run(each)
            quantize_(each, dataclasses.replace(config, step="convert"))
    assert_same_state(model, whole)


@pytest.mark.parametrize("with_recipe", [False, True])
def test_experts_of_an_interrupted_call(monkeypatch, with_recipe):
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    data, options = expert_models.samples(), {"modalities": expert_models.NAMES}
    model, whole = expert_models.MoEModel(), expert_models.MoEModel()
    if with_recipe:
        config = masquant_config(calibrate(whole, data, progress=False, **options))
    else:
        config = MASQuantConfig(step="prepare", **options)
        for each in (model, whole):
            quantize_(each, config)
            for sample in data:
                with token_modalities(each, sample["modality_ids"]):
                    each(sample["x"])
        config.step = "convert"
    quantize_(whole, config)
    with monkeypatch.context() as patched:
        patched.setattr(MASQuantExperts, "from_float", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_(model, config)
    assert quantized_names(model) == ["first"]
    quantize_(model, config)
    assert_same_state(model, whole)


def test_data_after_an_interrupted_convert(model):
    """What was solved for is of the data before it, and so is what is left."""
    config = MASQuantConfig(step="prepare", **FAST)
    quantize_(model, config)
    run(model)
    config.step = "convert"
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, filter_fn=_Interruption(KeyboardInterrupt, 4))
    run(model)
    quantize_(model, config)
    assert len(quantized_names(model)) == 14


def test_two_configs_for_readers_of_one_input(model):
    quantize_(model, MASQuantConfig(step="prepare", **FAST))
    run(model)
    first = MASQuantConfig(step="convert", scheme="w8a8", **FAST)
    quantize_(model, first, filter_fn=lambda _, name: name.endswith("0.mlp.gate_proj"))
    with pytest.raises(ValueError, match="up_proj reads the same input as .*gate_proj"):
        quantize_(model, MASQuantConfig(step="convert", **FAST))
    quantize_(model, first)
    whole = tiny_models.quantized(tiny_models.qwen25_vl(), scheme="w8a8", **FAST)
    assert_same_state(model, whole)


def test_two_configs_for_parts_of_what_one_step_observed(model):
    quantize_(model, MASQuantConfig(step="prepare", **FAST))
    run(model)
    parts = {
        r"re:.*language_model\..*mlp\.\w*_proj": MASQuantConfig(step="convert", **FAST),
        r"re:.*language_model\..*attn\.\w*_proj": MASQuantConfig(
            step="convert", scheme="w8a8", **FAST
        ),
    }
    quantize_(model, FqnToConfig(OrderedDict(parts)), filter_fn=None)
    layer = model.model.language_model.layers[1]
    assert layer.mlp.up_proj.weight.weight_bits == 4
    assert layer.self_attn.q_proj.weight.weight_bits == 8
    expected = tiny_models.quantized(tiny_models.qwen25_vl(), scheme="w8a8", **FAST)
    theirs = expected.model.language_model.layers[0].self_attn.q_proj.weight
    ours = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(ours.qdata, theirs.qdata)
    assert len(quantized_names(model)) == 14


def test_threads_share_a_config(recipe):
    config = masquant_config(recipe)
    models = [tiny_models.qwen25_vl() for _ in range(4)]
    threads = [threading.Thread(target=quantize_, args=(m, config)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models[1:]:
        assert_same_state(models[0], model)
    assert quantized_names(models[0]) == list(recipe.layers)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_rounding_needs_one_call_and_no_data(scheme):
    model, other = tiny_models.qwen25_vl(), tiny_models.qwen25_vl()
    options = {"method": "rtn", "scheme": scheme, "group_size": 16}
    quantize_(model, MASQuantConfig(step="convert", **options))
    assert_same_state(model, tiny_models.quantized(other, **options))
    run(model)


def test_rounding_experts_in_one_call():
    model, other = expert_models.MoEModel(), expert_models.MoEModel()
    options = {"method": "rtn", "modalities": expert_models.NAMES}
    recipe = calibrate(other, expert_models.samples(), progress=False, **options)
    quantize_(other, masquant_config(recipe))
    quantize_(model, MASQuantConfig(step="convert", **options))
    assert_same_state(model, other)


def test_rounding_changes_nothing_where_a_group_does_not_fit(model):
    config = MASQuantConfig(step="convert", method="rtn", group_size=24)
    with pytest.raises(ValueError, match="group_size=24 does not divide .*q_proj"):
        quantize_(model, config)
    assert not quantized_names(model)
