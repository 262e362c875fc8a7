# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""save_pretrained and from_pretrained of quantized models, and torchao's own route."""

import copy
import dataclasses
import json
from typing import Any

import format_1
import pytest
import tiny_models
import torch
from checkpoints import assert_same_logits, assert_same_state, entry_of, logits, stored
from linear_oracle import linears_of as linears
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import BOS, words
from torchao.quantization import quantize_
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from torchao_masquant import (
    MASQuantConfig,
    MASQuantTensor,
    calibrate,
    masquant_config,
    save_quantized,
    token_modalities,
)
from torchao_masquant.__main__ import main
from torchao_masquant.cli.description import describe
from torchao_masquant.integrations.checkpoint_format import flatten_state_dict
from torchao_masquant.integrations.dequantizing import dequantize_model

# Of the solver's choices, which are not what is tested here.
FAST = {"alpha": 0.5, "separation": 1.0}


def prompt() -> dict[str, Any]:
    return tiny_models.batch([BOS, *words(6, 3), "image", *words(3, 5)], seed=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that sees, and the folder that it was saved to."""
    model = tiny_models.quantized(tiny_models.qwen25_vl(), **FAST)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_the_files_hold_packed_integers(saved):
    model, folder = saved
    tensors = stored(folder)
    expected = 0
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, MASQuantTensor):
            # Files have the names that transformers gave the original's.
            linear = name.removesuffix(".weight").replace(".language_model.", ".")
            n, k = tensor.shape
            qdata = tensors[f"{linear}._weight_qdata"]
            assert qdata.dtype == torch.uint8 and qdata.shape == (n, k // 2)
            assert torch.equal(qdata, tensor.qdata)
            assert tensors[f"{linear}.weight"].tolist() == [0]
            expected += tensor.nbytes_stored + 1
        else:
            expected += tensor.nbytes
    assert sum(t.nbytes for t in tensors.values()) == expected
    dense = sum(p.numel() * 4 for p in tiny_models.qwen25_vl().parameters())
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    header = sum(
        8 + int.from_bytes(file.read_bytes()[:8], "little")
        for file in folder.glob("*.safetensors")
    )
    assert on_disk == expected + header
    # Half of the model is in its towers and its head, which stay.
    assert expected < 0.75 * dense


def test_the_config_describes_every_linear(saved):
    model, folder = saved
    entry = entry_of(folder)
    assert (entry["quant_method"], entry["format_version"]) == ("masquant", 4)
    assert set(entry["layers"]) == set(linears(model))
    for name, numbers in entry["layers"].items():
        weight = linears(model)[name].weight
        found = entry["formats"][numbers["format"]]
        assert found["shape"] == list(weight.shape)
        assert (found["weight_bits"], found["act_bits"]) == (4, 8)
        assert found["modalities"] == ["text", "vision"]
        assert found["ranks"] == list(weight.ranks)
        assert found["group_size"] is None
        options = entry["options"][numbers["options"]]
        assert (options["scheme"], options["alpha"]) == ("w4a8", 0.5)
    # Linears of the same kind share a description.
    assert len(entry["formats"]) < len(entry["layers"]) / 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32, "device_map": "cpu"},
        {"device_map": "auto", "low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_a_saved_model_comes_back_to_the_bit(saved, options):
    if "device_map" in options:
        pytest.importorskip("accelerate")
    model, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert type(loaded) is type(model) and not loaded.training
    assert_same_state(model, loaded)
    inputs = prompt()
    assert_same_logits(model, loaded, inputs)
    assert not any(
        w.requires_grad for w in (m.weight for m in linears(loaded).values())
    )
    generate = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        loaded.generate(**inputs, **generate), model.generate(**inputs, **generate)
    )


def test_a_rotated_model_comes_back_to_the_bit(saved, tmp_path, capsys):
    """And its folder is of a version that a reader without rotations refuses."""
    model = tiny_models.qwen25_vl()
    recipe = tiny_models.recipe_of(model, rounding="nearest", clip=False, **FAST)
    for name in list(recipe.layers)[::2]:
        recipe.layers[name] = dataclasses.replace(recipe.layers[name], hadamard_size=16)
    tiny_models.quantized(model, recipe)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    entry = entry_of(folder)
    assert entry["format_version"] == 4
    sizes = {
        name: entry["formats"][numbers["format"]].get("hadamard_size")
        for name, numbers in entry["layers"].items()
    }
    assert sizes == {n: recipe.layers[n].hadamard_size for n in sizes}
    recipe.save(tmp_path / "recipe.safetensors")
    for path in (folder, tmp_path / "recipe.safetensors"):
        assert {x.name: x.hadamard_size for x in describe(path).linears} == sizes
        assert main(["inspect", str(path)]) == 0
        assert "w4a8, rotated by 16" in " ".join(capsys.readouterr().out.split())
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert_same_state(model, loaded)
    inputs = prompt()
    assert_same_logits(model, loaded, inputs)
    # A dense model of it computes the same, but for the rounding of its inputs.
    weights = {n: m.weight.data for n, m in linears(loaded).items()}
    dequantize_model(loaded)
    for name, weight in weights.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight.dequantize())
    # Without any there is no trace of them.
    plain = tiny_models.qwen25_vl()
    recipe = tiny_models.recipe_of(plain, hadamard_size=1, **FAST)
    tiny_models.quantized(plain, recipe).save_pretrained(tmp_path / "plain")
    text = (tmp_path / "plain" / "config.json").read_text()
    assert '"format_version": 3' in text
    formats = json.loads(text)["quantization_config"]["formats"]
    assert not any("hadamard_size" in one for one in formats)


def test_a_loaded_model_is_routed(saved):
    model, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    routers = {id(m.router) for m in linears(loaded).values()}
    assert len(routers) == 1
    assert tiny_models.router(loaded).modalities == ("text", "vision")
    linear = loaded.get_decoder().layers[0].mlp.up_proj
    x = torch.randn(1, 3, tiny_models.HIDDEN)
    with pytest.raises(RuntimeError, match="modality of its tokens is not known"):
        linear(x)
    own = model.get_decoder().layers[0].mlp.up_proj
    ids = torch.tensor([[0, 1, 0]])
    with token_modalities(loaded, ids), token_modalities(model, ids), torch.no_grad():
        assert torch.equal(linear(x), own(x))


def test_a_device_map_without_accelerate_is_refused_by_name(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(
        "transformers.integrations.accelerate.is_accelerate_available", lambda: False
    )
    with pytest.raises(ValueError, match="requires `accelerate`. You can install it"):
        AutoModelForImageTextToText.from_pretrained(folder, device_map="cpu")


def test_a_device_map_that_would_fill_a_disk_is_refused(saved):
    pytest.importorskip("accelerate")
    _, folder = saved
    with refused("^quantized weights cannot be offloaded"):
        AutoModelForImageTextToText.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": "50KB"}
        )


def test_a_loaded_model_is_compiled(saved):
    model, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    inputs, expected = prompt(), logits(model, prompt())
    torch._dynamo.reset()
    layer = loaded.get_decoder().layers[0]
    layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    found = logits(loaded, inputs)
    # A sum in another order rounds a few activations to the next of 8-bit integers.
    assert (found - expected).norm() / expected.norm() < 0.03
    # And is saved as it was.
    assert_same_state(model, loaded)


def test_shards(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {p.name for p in tmp_path.glob("*.safetensors")}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_state(model, loaded)


def test_saving_a_loaded_model_writes_the_same_files(saved, tmp_path):
    _, folder = saved
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    file = "model.safetensors"
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    # The rest of config.json is transformers'.
    assert entry_of(folder) == entry_of(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w8a8", "low_rank_bits": 8, "rank": 3},
        {"scheme": "w4a16", "group_size": 16},
        {"scheme": "w3a3", "rank": 0},
        {"scheme": "w4a4", "method": "masquant-paper"},
        {"scheme": "w8a8", "method": "smoothquant"},
        {"scheme": "w4a8", "base_modality": "vision"},
    ],
    ids=str,
)
def test_every_kind_of_weight(options, tmp_path):
    options = ({} if options.get("method") else FAST) | options
    model = tiny_models.quantized(tiny_models.qwen25_vl(layers=1), **options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_state(model, loaded)
    assert_same_logits(model, loaded, prompt())


def test_bfloat16(tmp_path):
    tiny_models.qwen25_vl(layers=1).save_pretrained(tmp_path / "dense")
    dense = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "dense", dtype=torch.bfloat16
    )
    model = tiny_models.quantized(dense, **FAST)
    model.save_pretrained(tmp_path / "x")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert loaded.dtype == torch.bfloat16
    assert_same_state(model, loaded)
    inputs = prompt()
    assert_same_logits(model, loaded, inputs)


def cast_while_loading(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


def cast_afterwards(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).to(torch.bfloat16)


@pytest.mark.parametrize(
    "load, stands_for",
    [(cast_while_loading, torch.bfloat16), (cast_afterwards, torch.float32)],
)
def test_another_dtype_than_the_saved_one(saved, load, stands_for):
    """Plain weights are cast, integers and their scales are not."""
    model, folder = saved
    loaded = load(folder)
    for name, linear in linears(loaded).items():
        weight, before = linear.weight, linears(model)[name].weight
        assert weight.dtype == stands_for
        assert torch.equal(weight.qdata, before.qdata)
        assert torch.equal(weight.scale, before.scale)
    plain = [p for p in loaded.parameters() if not isinstance(p.data, MASQuantTensor)]
    assert {p.dtype for p in plain} == {torch.bfloat16}
    inputs, expected = prompt(), logits(model, prompt())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    # Two layers of bfloat16, 8 bits of mantissa.
    error = logits(loaded, inputs).float() - expected
    assert error.norm() / expected.norm() < 0.05


def test_a_loaded_model_is_moved(saved):
    model, folder = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert_same_state(model, loaded.to("cpu"))
    assert all(p.is_meta for p in loaded.to("meta").parameters())


@pytest.mark.filterwarnings("ignore:.*UNEXPECTED")
def test_the_model_without_its_head(saved):
    model, folder = saved
    loaded = AutoModel.from_pretrained(folder)
    assert set(linears(loaded)) == {n.removeprefix("model.") for n in linears(model)}
    inputs = prompt()
    with torch.no_grad():
        hidden = loaded(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)


def test_a_model_whose_head_is_its_embedding(tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    samples = [{"input_ids": torch.arange(2, 26).reshape(2, 12) + i} for i in range(4)]
    recipe = calibrate(model, samples, progress=False, **FAST)
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_logits(model, loaded, samples[0])


def test_a_part_of_a_model_by_two_configs(tmp_path):
    model = tiny_models.qwen25_vl()
    first = tiny_models.recipe_of(
        model, scheme="w8a8", include="*layers.0.self*", **FAST
    )
    second = tiny_models.recipe_of(model, include="*layers.1.mlp*", **FAST)
    quantize_(model, masquant_config(first))
    quantize_(model, masquant_config(second))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(linears(loaded)) == 7
    assert_same_state(model, loaded)
    entry = entry_of(tmp_path)
    schemes = {
        name: entry["options"][numbers["options"]]["scheme"]
        for name, numbers in entry["layers"].items()
    }
    for name, scheme in schemes.items():
        assert scheme == ("w8a8" if ".self_attn." in name else "w4a8")


def test_memory_that_weights_share_is_written_for_each(tmp_path):
    """One smoothing factor for two linears, and half of a weight."""
    weight = MASQuantTensor.from_hp(torch.randn(8, 6))
    other = MASQuantTensor.from_hp(torch.randn(8, 6))
    other.act_pre_scale = weight.act_pre_scale
    half = MASQuantTensor.from_hp(torch.randn(8, 6))[2:6]
    state = {"a.weight": weight, "b.weight": other, "c.weight": half}
    flat = flatten_state_dict(state | {"c.bias": torch.ones(4)})
    save_file(flat, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert sum(t.nbytes for t in read.values()) == 16 + sum(
        t.nbytes_stored for t in state.values()
    )
    for name, tensor in state.items():
        for part in tensor.__tensor_flatten__()[0]:
            found = read[f"{name[0]}._weight_{part}"]
            assert torch.equal(found, getattr(tensor, part)), (name, part)


def test_a_copy_saves_itself(saved, tmp_path):
    model, folder = saved
    copied = copy.deepcopy(model)
    first = next(iter(linears(copied).values()))
    first.weight.scale.mul_(2)
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_state(copied, loaded)
    with pytest.raises(AssertionError):
        assert_same_state(model, loaded)


def test_torchaos_steps_leave_a_model_that_saves(tmp_path):
    model = tiny_models.qwen25_vl(layers=1)
    quantize_(model, MASQuantConfig(step="prepare", **FAST))
    for sample in tiny_models.samples(audio=False):
        model(**sample)
    quantize_(model, MASQuantConfig(step="convert", **FAST))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_state(model, loaded)
    # And one that has loaded a state_dict.
    empty = tiny_models.qwen25_vl(layers=1)
    quantize_(empty, MASQuantConfig(step="prepare_for_loading"))
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.save_pretrained(tmp_path / "again")
    assert_same_state(
        model, AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    )


def test_save_quantized_replaces_a_folder_and_keeps_what_is_not_its_own(
    saved, tmp_path
):
    model, folder = saved
    target = tmp_path / "a" / "model"
    save_quantized(model, target, max_shard_size="30KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    (target / "preprocessor_config.json").write_text("{}")
    (target / "more").mkdir()
    (target / "more" / "text").write_text("kept")
    loaded = AutoModelForImageTextToText.from_pretrained(target)
    # Into the folder that it was read from.
    save_quantized(loaded, target)
    assert {p.name for p in target.glob("model*")} == {"model.safetensors"}
    assert (target / "preprocessor_config.json").read_text() == "{}"
    assert (target / "more" / "text").read_text() == "kept"
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    assert (target / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert target.stat().st_mode == folder.stat().st_mode


def test_save_quantized_writes_through_a_link(saved, tmp_path):
    model, _ = saved
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_quantized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_format_1_is_still_read():
    """The file in the repository, against what its maker computed."""
    loaded = AutoModelForImageTextToText.from_pretrained(format_1.FOLDER)
    with safe_open(format_1.FOLDER / format_1.OUTPUTS, framework="pt") as file:
        inputs = {name: file.get_tensor(name) for name in file.keys()}
    expected = inputs.pop("logits")
    parts = {
        name
        for linear in linears(loaded).values()
        for name in linear.weight.data.__tensor_flatten__()[0]
    }
    # Of all that integers have.
    assert parts | {"row_scale"} == {
        *MASQuantTensor.tensor_data_names,
        *MASQuantTensor.optional_tensor_data_names,
    }
    found = logits(loaded, inputs)
    # Another order of sums may round a few activations to the next of 8-bit integers.
    error = (found - expected).norm() / expected.norm()
    assert error < 0.01
    # Were a modality misread, it would show.
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert (logits(loaded, swapped) - expected).norm() / expected.norm() > 0.1
    size = sum(file.stat().st_size for file in format_1.FOLDER.iterdir())
    assert size < 100_000
