# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What transformers' own methods do, asked of ours."""

import contextlib
import copy

import pytest
import tiny_models
import torch
from torch import nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    PerAxis,
    quantize_,
)
from transformers import AutoModelForImageTextToText, TorchAoConfig

from torchao_masquant import (
    MASQuantConfig,
    MASQuantHfConfig,
    MASQuantLinear,
    MASQuantTensor,
    masquant_config,
    token_modalities,
)

FAST = {"alpha": 0.5, "separation": 1.0}
RTN = {"method": "rtn", "scheme": "w8a8"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = tiny_models.qwen25_vl()
    model.save_pretrained(folder)
    recipe = tiny_models.recipe_of(model, **FAST)
    recipe.save(folder / "recipe.safetensors")
    return folder, recipe


def load(folder, config):
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config
    )


def names(model):
    return [n for n, m in model.named_modules() if isinstance(m, MASQuantLinear)]


def logits(model):
    with torch.no_grad():
        return model(**tiny_models.batch([1, *tiny_models.words(8)])).logits


def test_a_model_quantized_in_place_is_as_one_that_was_loaded():
    model = tiny_models.qwen25_vl()
    dense = model.get_memory_footprint()
    count = model.num_parameters()
    quantize_(model, MASQuantConfig(step="convert", **RTN))
    assert model.is_quantized and model.quantization_method == "masquant"
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    assert model.num_parameters() == count
    weights = [m.weight.data for m in model.modules() if isinstance(m, MASQuantLinear)]
    saved = sum(w.numel() * 4 - w.nbytes_stored for w in weights)
    assert model.get_memory_footprint() == dense - saved


@pytest.mark.parametrize("by", ["recipe", "rtn"])
def test_dequantize_gives_a_plain_model(by, original, tmp_path):
    model = tiny_models.qwen25_vl()
    config = masquant_config(original[1])
    if by == "rtn":
        config = MASQuantConfig(step="convert", **RTN)
    quantize_(model, config)
    linear = model.model.language_model.layers[0].mlp.up_proj
    expected, before = linear.weight.data.dequantize(), logits(model)
    biased = model.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(20, 64)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if by == "recipe":
            stack.enter_context(token_modalities(model, None))
        read = biased(x)
    assert model.dequantize() is model
    assert type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor
    assert torch.equal(linear.weight.data, expected) and not hasattr(linear, "router")
    assert not names(model) and "forward" not in model.__dict__
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    # Activations are not rounded any more; what the base's bias was is the linear's.
    assert (biased(x) - read).abs().max() < 0.03 * read.abs().max()
    if by == "rtn":
        assert (logits(model) - before).abs().max() < 0.2 * before.abs().max()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    quantize_(model, MASQuantConfig(step="convert", **RTN))
    assert len(names(model)) == 14


def test_dequantize_after_loading(original, tmp_path):
    model = load(original[0], MASQuantHfConfig(recipe=original[1]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    plain = loaded.dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert not names(plain) and plain.half().dtype == torch.float16


def test_a_dict_in_place_of_a_config(original):
    folder, recipe = original
    path = str(folder / "recipe.safetensors")
    model = load(folder, {"quant_method": "masquant", "recipe": path})
    assert names(model) == list(recipe.layers)
    given = {"quant_method": "masquant", "method": "rtn", "scheme": "W8A8"}
    left_out = {"modules_to_not_convert": ["model.language_model.layers.0", "o_proj"]}
    found = names(load(folder, given | left_out))
    assert len(found) == 6 and all(".layers.1." in name for name in found)
    for wrong, message in (
        ({"bits": 4}, "has no field 'bits'"),
        ({"modules_to_not_convert": ["model"]}, "leaves no linear to quantize"),
        ({"method": "masquant"}, "needs a calibration"),
        ({"hadamard_size": 8}, "method 'rtn' is kept as it was published"),
        ({"hadamard_size": 24}, "must be a power of two, or 1 for no rotation, got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, given | wrong)


def test_a_config_that_is_not_used_yet_through_a_dict(original):
    folder, recipe = original
    path = str(folder / "recipe.safetensors")
    for config in (
        MASQuantHfConfig(config=masquant_config(path, exclude="*.mlp.*")),
        MASQuantHfConfig(
            config=MASQuantConfig("convert", group_size=16, hadamard_size=1, **RTN),
            modules_to_not_convert=["lm_head"],
        ),
    ):
        again = MASQuantHfConfig.from_dict(config.to_dict())
        assert again.config == config.config and again.to_dict() == config.to_dict()
        assert again.modules_to_not_convert == config.modules_to_not_convert
        assert copy.deepcopy(config).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="made with a recipe in memory"):
        MASQuantHfConfig.from_dict(MASQuantHfConfig(recipe=recipe).to_dict())


def test_a_torchao_config_with_ours(original):
    folder, recipe = original
    ours = masquant_config(folder / "recipe.safetensors")
    model = load(folder, TorchAoConfig(ours, modules_to_not_convert=["lm_head"]))
    assert names(model) == list(recipe.layers)
    assert model.quantization_method == "masquant"
    other = load(folder, TorchAoConfig(Int8WeightOnlyConfig()))
    weight = other.model.language_model.layers[0].mlp.up_proj.weight.data
    assert not isinstance(weight, MASQuantTensor) and type(weight) is not torch.Tensor


@pytest.mark.parametrize(
    ("base", "scheme", "group_size"),
    [
        (Int8DynamicActivationInt8WeightConfig(), "w8a8", None),
        (Int8DynamicActivationIntxWeightConfig(torch.int4), "w4a8", 32),
        (Int8DynamicActivationIntxWeightConfig(torch.int4, PerAxis(0)), "w4a8", None),
        (Int4WeightOnlyConfig(group_size=64), "w4a16", 64),
    ],
)
def test_a_base_config(base, scheme, group_size):
    for config in (
        MASQuantConfig(base, step="prepare"),
        MASQuantConfig(base, "prepare"),
        MASQuantConfig(step="prepare", base_config=base),
    ):
        assert config == MASQuantConfig(
            step="prepare", scheme=scheme, group_size=group_size
        )


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (Int8WeightOnlyConfig(), {}, "the integers of Int8WeightOnlyConfig: as a"),
        (
            Int8DynamicActivationIntxWeightConfig(torch.int3),
            {},
            "with weight_dtype=torch.int3",
        ),
        (
            Int4WeightOnlyConfig(),
            {"scheme": "w8a8"},
            "base_config asks for 'w4a16', and scheme for 'w8a8'",
        ),
        (Int4WeightOnlyConfig(), {"group_size": 32}, "a group_size of 128, and"),
    ],
)
def test_a_base_config_that_no_scheme_has(base, options, message):
    with pytest.raises(ValueError, match=message):
        MASQuantConfig(base, step="prepare", **options)
