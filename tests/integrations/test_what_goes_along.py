# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What of a model's folder is beside its quantized weights: files and tensors."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Callable

import pytest
import tiny_models
import torch
import transformers
from checkpoints import stored
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.quantization import quantize_
from transformers import AutoModelForImageTextToText

from torchao_masquant import MASQuantConfig, MASQuantHfConfig, save_quantized
from torchao_masquant.integrations.other_files import copy_other_files
from torchao_masquant.sequential import calibrate_sequential

#: Written into the original's folder, and whether each goes along.
FILES = {
    "tokenizer.json": True,
    "qwen.tiktoken": True,
    "spk_dict.pt": True,
    "vocab.bin": True,
    "LICENSE": True,
    "modeling_own.py": True,
    "additional_chat_templates/tool_use.jinja": True,
    "assets/deeper/voice.wav": True,
    "vision-lora/adapter_model.safetensors": True,
    "vision-lora/adapter_config.json": True,
    # Of the original, or of nobody.
    ".gitattributes": False,
    ".cache/huggingface/x.lock": False,
    "__pycache__/modeling_own.cpython-311.pyc": False,
    # The same weights once more, or others.
    "pytorch_model.bin": False,
    "consolidated.safetensors": False,
    "model-q4.gguf": False,
    "onnx/model.onnx": False,
    "onnx/config.json": False,
    "original/params.json": False,
    "original/consolidated.00.pth": False,
    "checkpoint-500/model.safetensors": False,
    "optimizer.pt": False,
}
NAMED = [
    "checkpoint-500/",
    "consolidated.safetensors",
    "model-q4.gguf",
    "onnx/",
    "optimizer.pt",
    "original/",
    "pytorch_model.bin",
]
#: That no class loads.
TENSORS = {
    "mtp.fc.weight": torch.arange(12.0).reshape(3, 4),
    "mtp.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "model.layers.61.eh_proj.weight": torch.zeros(2, 2, dtype=torch.float16),
}


def quantize(original: Path, output: Path) -> None:
    config = MASQuantConfig(step="convert", method="rtn", scheme="w8a8")
    model = AutoModelForImageTextToText.from_pretrained(
        original, quantization_config=MASQuantHfConfig(config=config)
    )
    save_quantized(model, output, beside=original)


def sequential(original: Path, output: Path) -> None:
    calibrate_sequential(
        original,
        tiny_models.samples(audio=False),
        output=output,
        method="rtn",
        scheme="w8a8",
        progress=False,
    )


ROUTES = {"quantize": quantize, "sequential": sequential}
both_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
Route = Callable[[Path, Path], None]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "original"
    tiny_models.qwen25_vl(layers=1).save_pretrained(folder)
    return folder


def add_files(folder: Path) -> None:
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def messages(caplog: Any, start: str) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name.startswith("torchao_m")]
    return [message for message in found if message.startswith(start)]


@both_routes
def test_files(original, route, tmp_path, caplog):
    add_files(original)
    with caplog.at_level(logging.WARNING):
        route(original, tmp_path / "q")
    found = files(tmp_path / "q")
    assert {name: name in found for name in FILES} == FILES
    # The model card is the new model's own.
    assert (tmp_path / "q" / "README.md").read_text() != "README.md"
    for name, kept in FILES.items():
        if kept:
            assert (tmp_path / "q" / name).read_text() == name
    (said,) = messages(caplog, "not copied")
    assert said.endswith(": " + ", ".join(NAMED) + ".")
    # None of it is in the way.
    (tmp_path / "q" / "vision-lora").rename(tmp_path / "lora")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "q")


def test_links_into_a_cache(tmp_path, caplog):
    """As the hub's cache has a model: links to files that are named by their digests."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a1b2"
    blobs.mkdir()
    for index, name in enumerate(["merges.txt", "more/vocab.tiktoken"]):
        (blobs / str(index)).write_text(name)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    (snapshot / "gone.txt").symlink_to(blobs / "gone")
    new = tmp_path / "new"
    new.mkdir()
    (new / "merges.txt").write_text("newer")
    with caplog.at_level(logging.WARNING):
        copy_other_files(snapshot, new)
    assert files(new) == {"merges.txt", "more/vocab.tiktoken"}
    assert (new / "merges.txt").read_text() == "newer"
    copied = new / "more" / "vocab.tiktoken"
    assert not copied.is_symlink() and copied.read_text() == "more/vocab.tiktoken"
    (said,) = messages(caplog, "not copied")
    assert said.endswith(": gone.txt.")


def test_a_quantized_model_is_not_put_inside_of_its_originals_folder(original):
    before = files(original)
    with pytest.raises(ValueError, match="it lies in what is read, .*; give a folder"):
        quantize(original, original / "quantized")
    assert files(original) == before


@both_routes
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors(original, route, shards, tmp_path, caplog):
    if shards == 1:
        state = stored(original)
        save_file(state | TENSORS, original / "model.safetensors", {"format": "pt"})
    else:
        model = AutoModelForImageTextToText.from_pretrained(original)
        model.save_pretrained(original, max_shard_size="60KB")
        (original / "model.safetensors").unlink()
        save_file(TENSORS, original / "mtp.safetensors", {"format": "pt"})
        path = original / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= dict.fromkeys(TENSORS, "mtp.safetensors")
        path.write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        route(original, tmp_path / "q")
    found = stored(tmp_path / "q")
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    (said,) = messages(caplog, "carried over")
    assert "3 tensors of the original that Qwen2_5_VLForConditionalGeneration" in said
    assert all(name in said for name in TENSORS)
    # The index tells of all that the files hold, once.
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    by_file: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, set()).add(name)
    on_disk = {}
    for file in (tmp_path / "q").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            on_disk[file.name] = set(opened.keys())
    assert by_file == on_disk
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "q")
    call = tiny_models.batch([1, 11, "image", 12])
    assert loaded(**call).logits.isfinite().all()
    # It is an original in its turn.
    save_quantized(loaded, tmp_path / "again", beside=tmp_path / "q")
    assert stored(tmp_path / "again").keys() == found.keys()


def test_tensors_of_pickled_files(original, tmp_path):
    state = stored(original) | TENSORS
    torch.save(state, original / "pytorch_model.bin")
    (original / "model.safetensors").unlink()
    quantize(original, tmp_path / "q")
    found = stored(tmp_path / "q")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_language_model_without_its_towers_leaves_them(original, tmp_path, caplog):
    """What a part does not load is no loss of the part."""
    config = MASQuantConfig(step="convert", method="rtn", scheme="w8a8")
    whole = AutoModelForImageTextToText.from_pretrained(original)
    text = transformers.Qwen2_5_VLTextModel.from_pretrained(
        original,
        config=whole.config.text_config,
        quantization_config=MASQuantHfConfig(config=config),
    )
    with caplog.at_level(logging.WARNING):
        save_quantized(text, tmp_path / "q", beside=original)
    assert not any("visual" in name for name in stored(tmp_path / "q"))
    (said,) = messages(caplog, "left out, as of a larger model")
    assert "visual." in said


def test_tensors_that_a_save_without_the_original_leaves_are_named(
    original, tmp_path, caplog
):
    state = stored(original)
    save_file(state | TENSORS, original / "model.safetensors", {"format": "pt"})
    config = MASQuantConfig(step="convert", method="rtn", scheme="w8a8")
    model = AutoModelForImageTextToText.from_pretrained(original)
    quantize_(model, config)
    with caplog.at_level(logging.WARNING):
        save_quantized(model, tmp_path / "q")
    (said,) = messages(caplog, "not saved: 3 tensors of")
    assert said.endswith("takes them along.") and "beside=" in said
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "q")
    caplog.clear()
    save_quantized(again, tmp_path / "again")
    assert not messages(caplog, "not saved")
