# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models with experts, saved and loaded by transformers."""

import dataclasses
import json
from typing import Any, Callable

import pytest
import torch
import transformers
from checkpoints import assert_same_logits, assert_same_state, entry_of
from families import FAMILIES
from refusals import refused
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantExperts,
    MASQuantHfConfig,
    MASQuantTensor,
    Recipe,
    calibrate,
    evaluate,
    masquant_config,
    save_quantized,
)
from torchao_masquant.expert_modules import RoutedExperts
from torchao_masquant.report import write_report
from torchao_masquant.report.recipe_bytes import recipe_bytes


def _gpt_oss() -> Any:
    """Of text alone, its experts transposed and with biases."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention"],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_().mul_(0.12)
    return model.eval()


def _words(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, 64, (1, 40), generator=generator)}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "gpt-oss": (_gpt_oss, _words),
    **{
        name: (family.model, family.mixed)
        for family in FAMILIES
        if (name := family.name) == "Qwen3-VL-MoE"
    },
}


def assert_same(model: Any, other: Any, inputs: dict[str, Any]) -> None:
    """Bit for bit, in what they hold and in what they compute."""
    assert_same_state(model, other)
    assert_same_logits(model, other, inputs)


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A model, its recipe, the model quantized, and where both are saved."""
    build, inputs = MODELS[request.param]
    folder = tmp_path_factory.mktemp("experts")
    dense, model = build(), build()
    recipe = calibrate(
        model,
        [inputs(seed) for seed in (1, 2)],
        alpha=0.5,
        separation=1.0,
        progress=False,
    )
    quantize_(model, masquant_config(recipe))
    dense.save_pretrained(folder / "dense")
    save_quantized(model, folder / "quantized")
    return dense, recipe, model, folder, inputs(9)


def test_a_saved_model_comes_back_to_the_bit(saved, tmp_path):
    _, _, model, folder, inputs = saved
    loaded = type(model).from_pretrained(folder / "quantized")
    experts = [m for m in loaded.modules() if isinstance(m, RoutedExperts)]
    assert experts and all(isinstance(m, MASQuantExperts) for m in experts)
    assert len({id(m.router) for m in experts}) == 1
    assert_same(model, loaded, inputs)
    save_quantized(loaded, tmp_path / "again")
    assert_same(model, type(model).from_pretrained(tmp_path / "again"), inputs)


def test_rotated_experts_come_back_to_the_bit(tmp_path):
    """All experts of a projection in blocks of one size."""
    model = _gpt_oss()
    recipe = calibrate(model, [_words(1)], alpha=0.5, separation=1.0, progress=False)
    for name, layer in recipe.layers.items():
        if len(layer.shape) == 3:
            recipe.layers[name] = dataclasses.replace(layer, hadamard_size=16)
    recipe.save(tmp_path / "recipe.safetensors")
    assert Recipe.load(tmp_path / "recipe.safetensors").layers == recipe.layers
    quantize_(model, masquant_config(tmp_path / "recipe.safetensors"))
    save_quantized(model, tmp_path / "quantized")
    assert entry_of(tmp_path / "quantized")["format_version"] == 4
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    (experts,) = [m for m in loaded.modules() if isinstance(m, MASQuantExperts)]
    assert (
        experts.down_proj.hadamard_size == experts.gate_up_proj[0].hadamard_size == 16
    )
    assert_same(model, loaded, _words(9))


def test_files_hold_packed_integers(saved):
    _, _, model, folder, _ = saved
    entry = entry_of(folder / "quantized")
    assert entry["format_version"] == 4  # rotated
    stored = load_file(folder / "quantized" / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, MASQuantExperts):
            continue
        for projection in ("gate_up_proj", "down_proj"):
            weight = getattr(module, projection).data
            e, n, k = weight.shape
            # transformers may save under another prefix.
            place = name[name.index("layers.") :]
            (integers,) = (
                tensor
                for key, tensor in stored.items()
                if key.endswith(f"{place}._{projection}_qdata")
            )
            assert integers.dtype == torch.uint8
            assert integers.shape == (e, n, k // 2)
            assert not any(k.endswith(f"{place}.{projection}") for k in stored)
            numbers = entry["layers"][f"{name}.{projection}"]
            assert entry["formats"][numbers["format"]]["shape"] == [e, n, k]
            assert entry["options"][numbers["options"]]["scheme"] == "w4a8"


def test_quantizing_while_loading_is_quantizing_after(saved):
    dense, recipe, model, folder, inputs = saved
    loaded = type(model).from_pretrained(
        folder / "dense", quantization_config=MASQuantHfConfig(recipe)
    )
    assert_same(model, loaded, inputs)
    nearest = MASQuantConfig(step="convert", method="rtn", exclude="*.self_attn.*")
    loaded = type(model).from_pretrained(
        folder / "dense", quantization_config=MASQuantHfConfig(config=nearest)
    )
    by_hand = type(model).from_pretrained(folder / "dense")
    recipe = calibrate(
        by_hand, [inputs], method="rtn", exclude="*.self_attn.*", progress=False
    )
    quantize_(by_hand, masquant_config(recipe))
    for name, parameter in by_hand.named_parameters():
        if hasattr(parameter, "qdata"):
            other = loaded.get_parameter(name)
            assert torch.equal(other.qdata, parameter.qdata), name
            assert torch.equal(other.scale, parameter.scale), name


@pytest.mark.parametrize("saved", ["gpt-oss"], indirect=True)
def test_experts_of_another_recipe_are_refused_while_loading(saved):
    dense, recipe, model, folder, _ = saved
    name = next(n for n, part in recipe.layers.items() if len(part.shape) == 3)
    part = recipe.layers[name]
    fingerprint, part.fingerprint = part.fingerprint, "0" * 16
    try:
        with pytest.raises(ValueError, match=rf"^{name}: the recipe was made for a"):
            type(model).from_pretrained(
                folder / "dense", quantization_config=MASQuantHfConfig(recipe)
            )
    finally:
        part.fingerprint = fingerprint
    other = masquant_config(recipe, exclude="*.down_proj")
    with pytest.raises(ValueError, match="^experts are quantized as a whole, and "):
        type(model).from_pretrained(
            folder / "dense", quantization_config=MASQuantHfConfig(config=other)
        )


def damaged(saved, tmp_path, change: Callable[[dict[str, Any], dict[str, Any]], None]):
    """Load a copy of which the format and the tensors were changed."""
    _, _, model, folder, _ = saved
    config = json.loads((folder / "quantized" / "config.json").read_text())
    tensors = load_file(folder / "quantized" / "model.safetensors")
    change(config["quantization_config"], tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return type(model).from_pretrained(tmp_path)


def of_experts(entry: dict[str, Any]) -> dict[str, Any]:
    """The format of some second projection of experts."""
    name = next(n for n in entry["layers"] if n.endswith("experts.down_proj"))
    return entry["formats"][entry["layers"][name]["format"]]


def _key(names: Any, end: str) -> str:
    return next(name for name in names if name.endswith(end))


def _other_shape(entry, tensors):
    name = _key(tensors, "experts._down_proj_scale")
    tensors[name] = tensors[name][:3].clone()


def _not_experts(entry, tensors):
    layers = entry["layers"]
    layers["model.elsewhere"] = layers.pop(_key(layers, "experts.down_proj"))


def _half_of_experts(entry, tensors):
    for name in [n for n in entry["layers"] if n.endswith("experts.down_proj")]:
        del entry["layers"][name]


DAMAGE = {
    "a part is lost": (
        lambda entry, tensors: tensors.pop(_key(tensors, "experts._down_proj_qdata")),
        "experts.down_proj does not fit its config.json: its qdata is m",
    ),
    "a part of another shape": (
        _other_shape,
        "its scale is torch.float32 of shape .3, 64, 1., it should be",
    ),
    "another number of experts": (
        lambda entry, tensors: of_experts(entry)["shape"].__setitem__(0, 3),
        r"is of shape \(3, 64, 32\), the model's of shape \(4, 64, 32",
    ),
    "a shift of another kind": (
        lambda entry, tensors: of_experts(entry).update(own_shift=False),
        "its act_shift is torch.float32 of shape",
    ),
    "nothing said of the shift": (
        lambda entry, tensors: of_experts(entry).pop("own_shift"),
        "damaged: a format has the fields",
    ),
    "a shift that is no truth": (
        lambda entry, tensors: of_experts(entry).update(own_shift=1),
        "damaged: own_shift is true or false, got 1",
    ),
    "four sizes": (
        lambda entry, tensors: of_experts(entry)["shape"].insert(0, 2),
        "damaged: .*",
    ),
    "no experts": (_not_experts, "damaged: model.elsewhere of shape .* is none of"),
    "half of the experts": (
        _half_of_experts,
        "damaged: experts are quantized as a whole, and",
    ),
}


@pytest.mark.parametrize("saved", ["gpt-oss"], indirect=True)
@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(saved, change, message, tmp_path):
    with refused(message):
        damaged(saved, tmp_path, change)


@pytest.mark.parametrize("saved", ["gpt-oss"], indirect=True)
def test_scores_of_a_model_with_experts(saved):
    dense, _, model, _, inputs = saved
    labelled = {**inputs, "labels": inputs["input_ids"]}
    found = evaluate(model, [labelled], reference=dense, progress=False)
    assert found.scheme == "w4a8"
    held = sum(
        p.data.nbytes_stored
        for p in model.get_decoder().parameters()
        if isinstance(p.data, MASQuantTensor)
    )
    assert found.weight_bytes == held
    # What is 4 bits of integers and a little more, of what was 32 bits.
    assert held < found.reference_weight_bytes / 2


@pytest.mark.parametrize("saved", ["gpt-oss"], indirect=True)
def test_a_report_has_the_bytes_of_experts(saved, tmp_path):
    _, recipe, model, _, _ = saved
    sizes = recipe_bytes(recipe)
    for name, part in recipe.layers.items():
        module, _, parameter = name.rpartition(".")
        if len(part.shape) == 3:
            weight = getattr(model.get_submodule(module), parameter).data
            # Pairs of float32 in a recipe, of 16 bits in the model.
            assert sizes[name].total == weight.nbytes_stored, name
            assert sizes[name].bfloat16 == 2 * weight.numel()
    page = tmp_path / "report.html"
    write_report(page, recipe=recipe)
    assert "4 × 64 × 32" in page.read_text()
