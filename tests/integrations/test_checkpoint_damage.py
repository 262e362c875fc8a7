# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Damaged, foreign and hostile checkpoints, and saving that is cut short."""

import copy
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import format_1
import pytest
import refusals
import tiny_models
import torch
import transformers.modeling_utils
from before_loading import look_at
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from torchao_masquant import MASQuantHfConfig, save_quantized
from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
from torchao_masquant.integrations.layer_format import LayerFormat

MODEL = "model.safetensors"
CONFIG = "config.json"


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint, to be damaged."""
    return Path(shutil.copytree(format_1.FOLDER, tmp_path / "model"))


@pytest.fixture(scope="module")
def model():
    """A whole model."""
    return load(format_1.FOLDER)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def refused(folder: Path, match: str, **options: Any) -> None:
    """A checkpoint is refused with one sentence."""
    with refusals.refused(match):
        load(folder, **options)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the quantization_config."""
    config = json.loads((folder / CONFIG).read_text())
    change(config["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    tensors = load_file(folder / MODEL)
    # The file is mapped to memory, and written next.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def header_of(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_a_truncated_file(folder):
    content = (folder / MODEL).read_bytes()
    for size in (0, 4, 100, len(content) // 2, -1):
        (folder / MODEL).write_bytes(content[:size])
        refused(folder, r"^model.safetensors is cut off or damaged \(.*download or sav")


def test_a_damaged_a_doubled_and_a_missing_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    refused(tmp_path, f"^{shards[1].name} is cut off or damaged")
    shutil.copy(shards[0], shards[1])
    refused(tmp_path, f"^{shards[1].name} is cut off .* is in another file, too")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{shards[1].name} is not there, though the checkpoint's index names it: "
        "download or save the checkpoint again."
    )
    # With an index that does not tell of it either.
    index = json.loads((tmp_path / f"{MODEL}.index.json").read_text())
    index["weight_map"] = {
        name: file
        for name, file in index["weight_map"].items()
        if file != shards[1].name
    }
    (tmp_path / f"{MODEL}.index.json").write_text(json.dumps(index))
    refused(tmp_path, "is missing|the checkpoint has no ")


def test_a_flipped_byte_in_the_header(folder):
    """It is noticed, or changes no tensor: in what no reader looks at."""
    whole = load_file(folder / MODEL)
    content = (folder / MODEL).read_bytes()
    look_at(folder)
    chance = random.Random(0)
    harmless = 0
    for position in chance.sample(range(len(header_of(content))), 80):
        byte = content[position] ^ (1 << chance.randrange(8))
        damaged = content[:position] + bytes([byte]) + content[position + 1 :]
        (folder / MODEL).write_bytes(damaged)
        try:
            look_at(folder)
        except ValueError as error:
            message = str(error)
            assert (
                message.endswith(".")
                and "download or save it again" in message
                or ("the file is damaged, or of another model" in message)
            )
            continue
        harmless += 1
        found = load_file(folder / MODEL)
        assert set(found) == set(whole)
        for name, tensor in whole.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert harmless < 3


def test_a_header_byte_that_renames_a_tensor(folder):
    content = (folder / MODEL).read_bytes()
    for old, new, match in (
        (b"_weight_qdata", b"_weight_qdatb", "its qdata is missing"),
        (
            b'lm_head.weight"',
            b'lm_hedd.weight"',
            "the checkpoint has no lm_head.weight",
        ),
        (b'"F32"', b'"I32"', "its .* is torch.int32 |is torch.int32 of shape"),
    ):
        assert old in header_of(content)
        (folder / MODEL).write_bytes(content.replace(old, new, 1))
        refused(folder, match)


@pytest.mark.parametrize(
    "version, advice",
    [
        (7, "upgrade it"),
        (0, "quantize the model again"),
        ("1", "quantize"),
        (None, "q"),
    ],
)
def test_another_format_version(folder, version, advice):
    edit_config(folder, lambda entry: entry.update(format_version=version))
    refused(folder, rf"^the checkpoint is of MASQuant format {version!r}, .* {advice}")


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(entry: dict[str, Any]) -> None:
        *outer, last = path.split("/")
        found: Any = entry
        for key in outer:
            found = found[int(key)] if isinstance(found, list) else found[key]
        found[last] = value

    return change


LAYER = "model.language_model.layers.0.mlp.up_proj"


DAMAGED = [
    ("formats", {}),
    ("formats", [1]),
    ("options", None),
    ("layers", []),
    ("layers", {}),
    ("dtype", "float3"),
    ("dtype", "__class__"),
    (f"layers/{LAYER}", 3),
    (f"layers/{LAYER}/format", 4),
    (f"layers/{LAYER}/format", -1),
    (f"layers/{LAYER}/format", True),
    (f"layers/{LAYER}/options", 99),
    ("formats/0/shape", [32]),
    ("formats/0/shape", [32, "32"]),
    ("formats/0/shape", [10**18, 10**18]),
    ("formats/0/shape", [0, 32]),
    ("formats/0/weight_bits", 5),
    ("formats/0/weight_bits", 8),
    ("formats/0/act_bits", 8.0),
    ("formats/0/act_bits", 16),
    ("formats/0/group_size", 7),
    ("formats/0/group_size", -2),
    ("formats/0/group_size", "16"),
    ("formats/0/modalities", "text"),
    ("formats/0/modalities", ["text", "text"]),
    ("formats/0/modalities", ["text", "vision", "audio"]),
    ("formats/0/routed", 1),
    ("formats/0/routed", False),
    ("formats/0/ranks", [-2]),
    ("formats/0/ranks", [10**15]),
    ("formats/0/ranks", []),
    ("formats/0/dtype", "int8"),
    ("formats/0/dtype", "load"),
    ("formats/0/parts", ["qdata"]),
    ("formats/0/parts", {"qdata": "uint8"}),
    ("formats/0/parts/qdata", "int8"),
    ("formats/0/parts/l1", "bfloat16"),
    ("formats/0/parts/zero_point", "int8"),
    ("formats/0/parts/evil", "int8"),
    ("formats/0/parts/scale", {"a": 1}),
    ("formats/0/more", 1),
    ("formats/0/hadamard_size", 0),
    ("formats/0/hadamard_size", 3),
    ("formats/0/hadamard_size", 2**23),
    ("formats/0/hadamard_size", True),
    ("formats/0/hadamard_size", "8"),
    ("formats/0/hadamard_size", None),
]


def test_a_damaged_description(folder):
    """Refused before a file of weights is looked at."""
    (folder / MODEL).unlink()
    whole = (folder / CONFIG).read_text()
    for path, value in DAMAGED:
        (folder / CONFIG).write_text(whole)
        edit_config(folder, _set(path, value))
        damaged = "^the quantization_config of the checkpoint's config.json is damaged"
        with refusals.refused(damaged):
            look_at(folder)
    refused(folder, damaged)


def test_every_field_of_a_format_is_asked_for():
    entry = json.loads((format_1.FOLDER / CONFIG).read_text())["quantization_config"]
    for whole in entry["formats"]:
        found = LayerFormat.from_json(whole)
        assert found.to_json() == whole
        for field in whole:
            damaged = {k: v for k, v in whole.items() if k != field}
            with pytest.raises(ValueError, match="a format has the fields"):
                LayerFormat.from_json(damaged)
    again = CheckpointFormat.from_json(entry).to_json()
    for name, numbers in entry["layers"].items():
        for kind, index in (("format", "formats"), ("options", "options")):
            found = again[index][again["layers"][name][kind]]
            assert found == entry[index][numbers[kind]]


def test_sizes_are_compared_before_anything_is_allocated(folder, monkeypatch):
    """A rank that the description makes up does not reach torch.empty."""
    edit_config(folder, _set("formats/0/ranks", [2**24]))

    def allocate(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights are being loaded")

    loading = transformers.modeling_utils.PreTrainedModel._load_pretrained_model
    monkeypatch.setattr(
        transformers.modeling_utils.PreTrainedModel, "_load_pretrained_model", allocate
    )
    refused(folder, r"does not fit its config.json: its l1 is torch.int8 of shape")
    monkeypatch.undo()
    assert transformers.modeling_utils.PreTrainedModel._load_pretrained_model == loading


def test_a_description_of_another_model(folder):
    """The names are not the model's, or the shapes are not."""

    def rename(entry: dict[str, Any]) -> None:
        entry["layers"] = {
            name.replace("layers.0", "layers.7"): numbers
            for name, numbers in entry["layers"].items()
        }

    whole = (folder / CONFIG).read_text()
    edit_config(folder, rename)
    refused(folder, "quantized linear .*layers.7.* has none of that name: load it with")
    (folder / CONFIG).write_text(whole)
    edit_config(folder, _set("formats/2/shape", [64, 32]))
    refused(folder, r"is of shape \(64, 32\), the model's of shape \(48, 32\)")
    (folder / CONFIG).write_text(whole)
    edit_config(folder, _set("formats/2/modalities", ["text", "audio"]))
    refused(folder, r"config declares the modalities \('text', 'vision'\), not audio")


def test_a_recipe_for_another_model(tmp_path):
    other = tiny_models.qwen25_vl(layers=1)
    recipe = tiny_models.recipe_of(other, method="rtn")
    format_1.model().save_pretrained(tmp_path)
    config = MASQuantHfConfig(recipe=recipe)
    refused(
        tmp_path, "recipe was made for a weight of shape", quantization_config=config
    )


def test_files_of_a_model_that_is_not_quantized(folder):
    """Its config.json says that it is."""
    (folder / MODEL).unlink()
    format_1.model().save_pretrained(folder / "dense")
    shutil.copy(folder / "dense" / MODEL, folder / MODEL)
    refused(folder, "in full precision, its config.json says that it is quantized")


def test_quantized_files_whose_config_does_not_say_so(folder):
    """One linear of them."""

    def forget(entry: dict[str, Any]) -> None:
        del entry["layers"][LAYER]

    edit_config(folder, forget)
    refused(folder, "has a part of a quantized weight, .*up_proj.* does not know")


def test_parts_that_do_not_fit_their_description(folder):
    whole = (folder / MODEL).read_bytes()
    name = "model.layers.0.mlp.up_proj._weight_"
    for change, match in (
        (lambda t: t.pop(f"{name}scale"), "its scale is missing"),
        (
            lambda t: t.update({f"{name}zero_point": t[f"{name}scale"] + 1}),
            "should not be",
        ),
        (
            lambda t: t.update({f"{name}qdata": t[f"{name}qdata"].to(torch.uint8)}),
            "its qdata is torch.uint8 of shape .*, it should be torch.int8",
        ),
        (
            lambda t: t.update({f"{name}l1": t[f"{name}l1"].t().contiguous()}),
            r"its l1 is torch.bfloat16 of shape \(2, 32\), it should be",
        ),
        (
            lambda t: t.pop("model.norm.weight"),
            "has no model.language_model.norm.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}),
            r"norm.weight is torch.float32 of shape \(31,\), the model's",
        ),
        (
            lambda t: t.update({"model.extra": torch.zeros(2, dtype=torch.complex64)}),
            "model.extra is of type C64",
        ),
    ):
        (folder / MODEL).write_bytes(whole)
        edit_tensors(folder, change)
        refused(folder, match)


class _Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(folder, tmp_path):
    (folder / MODEL).unlink()
    payload = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(payload)))
    for options in ({}, {"use_safetensors": False, "weights_only": False}):
        refused(folder, "^pytorch_model.bin is no safetensors file", **options)
    assert not payload.exists()


def test_code_beside_a_checkpoint_is_not_run(folder, tmp_path):
    """Nor where its config.json asks for it."""
    payload = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(payload)!r}, 'w').close()")
    config = json.loads((folder / CONFIG).read_text())
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
    config["auto_map"] = {name: "evil.Evil" for name in classes}
    config["quantization_config"]["modules_to_import"] = ["evil"]
    (folder / CONFIG).write_text(json.dumps(config))
    load(folder)
    assert not payload.exists()


@pytest.fixture
def interrupted(monkeypatch):
    """Saving stops at the second shard."""

    def stop(error: BaseException) -> None:
        write = transformers.modeling_utils.safe_save_file
        written: list[str] = []

        def save(tensors: Any, path: Any, **options: Any) -> None:
            if written:
                raise error
            written.append(path)
            write(tensors, path, **options)

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)

    return stop


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["disk full", "interrupted"],
)
def test_an_interrupted_save_leaves_the_old_folder_whole(
    folder, model, interrupted, error
):
    before = contents(folder)
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data.zero_()
    interrupted(error)
    with pytest.raises(type(error)):
        save_quantized(changed, folder, max_shard_size="20KB")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(type(error)):
        save_quantized(changed, folder.parent / "new", max_shard_size="20KB")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


_KILLED = """
import os, signal, sys
import transformers.modeling_utils
from transformers import AutoModelForImageTextToText
from torchao_masquant import save_quantized

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model.lm_head.weight.data.zero_()
write, written = transformers.modeling_utils.safe_save_file, []

def save(tensors, path, **options):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    write(tensors, path, **options)

transformers.modeling_utils.safe_save_file = save
save_quantized(model, sys.argv[1], max_shard_size="20KB")
"""


def test_a_killed_save_leaves_the_old_folder_whole(folder, model):
    before = contents(folder)
    result = subprocess.run([sys.executable, "-c", _KILLED, folder])
    assert result.returncode == -signal.SIGKILL
    assert contents(folder) == before
    (left,) = (path for path in folder.parent.iterdir() if path != folder)
    assert left.name.startswith(".model.") and list(left.rglob("*.safetensors"))
    # What was left is in nobody's way.
    save_quantized(model, folder)
    assert load(folder).lm_head.weight.any()


@pytest.fixture
def two_steps(monkeypatch):
    """As where the system cannot exchange two folders in one."""
    monkeypatch.setattr(
        "torchao_masquant.atomic_files._exchange_at_once",
        lambda new, target: False,
    )


def test_a_save_that_cannot_take_the_old_ones_place(
    folder, model, monkeypatch, two_steps
):
    before = contents(folder)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(source).parent.name == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        save_quantized(model, folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_folders_trade_places_in_two_steps(folder, model, two_steps):
    (folder / "more").write_text("kept")
    save_quantized(model, folder, max_shard_size="20KB")
    assert (folder / "more").read_text() == "kept" and not (folder / MODEL).exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_target_that_cannot_be_written(folder, model):
    file = folder / MODEL
    before = contents(folder)
    with pytest.raises(NotADirectoryError, match="it is a file; give a folder.$"):
        save_quantized(model, file)
    with pytest.raises(
        NotADirectoryError, match=f"^cannot write .*{MODEL}' is a file.$"
    ):
        save_quantized(model, file / "model")
    assert contents(folder) == before
    if os.geteuid() != 0:
        folder.chmod(0o500)
        with pytest.raises(OSError, match="^cannot write .* is read-only"):
            save_quantized(model, folder / "model")
        folder.chmod(0o700)


def test_what_cannot_be_saved(tmp_path, model):
    with pytest.raises(ValueError, match="has no quantized linear: quantize it with"):
        save_quantized(format_1.model(), tmp_path / "x")
    with pytest.raises(TypeError, match="takes a transformers model, got a PlainModel"):
        save_quantized(tiny_models.PlainModel(), tmp_path / "x")
    dense = format_1.model()
    dense.hf_quantizer = model.hf_quantizer
    with pytest.raises(ValueError, match="has no quantized linear to save"):
        dense.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
