# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a model's folder, or its name on the hub, is taken for."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import save_file

from torchao_masquant import hub
from torchao_masquant.sequential.disk_model import DiskModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model, with a single file of other weights beside the shards."""
    model = tiny_models.qwen25_vl()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).is_file()
    state = {name: torch.full_like(t, 0.5) for name, t in model.state_dict().items()}
    save_file(state, tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


def test_weights_are_those_that_from_pretrained_loads(folder):
    """Of a folder that was saved to twice, once in shards."""
    loaded = type(tiny_models.qwen25_vl()).from_pretrained(folder)
    assert hub.weight_files(folder) == [folder / SINGLE]
    disk = DiskModel(folder)
    name = "lm_head.weight"
    with disk.loaded([name]):
        assert torch.equal(disk.model.state_dict()[name], loaded.lm_head.weight)
    (folder / SINGLE).unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and hub.weight_files(folder) == shards


def test_files_of_torch_are_for_who_can_read_them(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    (found,) = hub.weight_files(tmp_path, pickled=True)
    assert found.name == "pytorch_model.bin"
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        hub.weight_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}']
    + ['{"weight_map": {"a": "/b"}}', '{"weight_map": null}'],
)
def test_a_damaged_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match="index.json' is damaged .*: download or save"):
        hub.weight_files(tmp_path)


def test_an_index_keeps_what_it_says_beside_the_files(tmp_path):
    (tmp_path / INDEX).write_text('{"metadata": {"total_parameters": 3}}')
    hub.write_index(tmp_path, {"a": "x.safetensors"}, 12)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_parameters": 3, "total_size": 12},
        "weight_map": {"a": "x.safetensors"},
    }


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no config.json: give the folder of a transformers model"),
        ("{", "config.json' is no JSON file"),
        ("[1]", "config.json' holds a list, no config"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        hub.read_config(tmp_path)


@pytest.mark.parametrize("name", ["/no/such", "./such", "~/such", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    for asked in (hub.source_of, hub.folder_of):
        with pytest.raises(FileNotFoundError, match=f"there is no folder '{name}'"):
            asked(name)


def test_a_model_that_the_hub_does_not_give():
    assert hub.source_of("owner/name") == "owner/name"
    for asked in (hub.folder_of, hub.load_config):
        with pytest.raises(OSError, match="'owner/name' is no folder here, and cannot"):
            asked("owner/name")


def test_classes():
    config = tiny_models.qwen25_vl().config
    config.architectures = ["Nothing", "Qwen2_5_VLForConditionalGeneration"]
    named = hub.class_of(config, "go on")
    assert named is transformers.Qwen2_5_VLForConditionalGeneration
    assert type(hub.meta_model(hub.auto_class(config), config)) is named
    for names, said in (([], "names no class"), (["A", "B"], "names A and B")):
        config.architectures = names
        with pytest.raises(ValueError, match=f"{said}, which .* not have: go on"):
            hub.class_of(config, "go on")
    with pytest.raises(ValueError, match="'vit' is no language model"):
        hub.auto_class(transformers.ViTConfig())
