# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is written over, and what never is: by a command, and from Python."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from running import refused, run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from torchao_masquant import Recipe, save_quantized
from torchao_masquant.outputs import check_file, check_folder, kind_of
from torchao_masquant.testing import model_folders

CALIBRATE = ["--method", "rtn", "--max-samples", "1", "--include", "*.q_proj"]


def contents(folder):
    """Every file below a folder, and what is in it."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def model(tmp_path):
    return model_folders.text_model(tmp_path / "models" / "dense")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each output, of a small model; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    model = model_folders.text_model(folder / "model")
    recipe, quantized = folder / "recipe.safetensors", folder / "quantized"
    data = ["synthetic", "--max-samples", "1"]
    assert run("calibrate", model, "synthetic", "-o", recipe, *CALIBRATE) == 0
    assert run("quantize", model, "--recipe", recipe, "-o", quantized) == 0
    assert run("eval", quantized, *data, "-o", folder / "evaluation.json") == 0
    page = ["-o", folder / "page.html", "--png", folder / "png"]
    assert run("report", recipe, folder / "evaluation.json", *page) == 0
    return folder


def test_each_output_is_known_by_its_content(made, tmp_path):
    assert kind_of(made / "quantized") == "model"
    assert kind_of(made / "evaluation.json") == "evaluation"
    assert kind_of(made / "page.html") == "page"
    assert {kind_of(path) for path in (made / "png").iterdir()} <= {"figure"}
    shutil.copy(made / "recipe.safetensors", tmp_path / "recipe.backup")
    assert kind_of(tmp_path / "recipe.backup") == "recipe"
    assert kind_of(made / "model") is None
    assert kind_of(made / "model" / "model.safetensors") is None
    assert kind_of(made / "model" / "config.json") is None
    assert kind_of(tmp_path / "nowhere") is None
    for text in ("", "{", "[1, 2]", '{"format": 3}', "\x89PNG", "<html>"):
        (tmp_path / "other").write_text(text, encoding="latin-1")
        assert kind_of(tmp_path / "other") is None


# The original


def _same(model):
    return model


def _through_a_link(model):
    link = model.parent / "link"
    link.symlink_to(model)
    return link


def _relative(model):
    return model / ".." / model.name


def _below(model):
    return model / "w4a4"


def _above(model):
    return model.parent


def _link_to_the_folder_above(model):
    link = model.parent.parent / "models-link"
    link.symlink_to(model.parent)
    return link / "dense"


TARGETS = (_same, _through_a_link, _relative, _below, _above, _link_to_the_folder_above)


@pytest.mark.parametrize("target", TARGETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=" ".join)
def test_the_original_is_never_written_over(model, capsys, target, more):
    before = contents(model)
    path = target(model)
    said = refused(capsys, "quantize", model, "--rtn", "w4a4", "-o", path, *more)
    assert "which must stay as it is" in said or "lies in it" in said
    said = refused(
        capsys, "calibrate", model, "synthetic", "--sequential", "--quantized", path,
        *CALIBRATE, *more,
    )  # fmt: skip
    assert said.startswith("error: cannot write")
    assert contents(model) == before
    assert {p.name for p in model.parent.iterdir()} <= {"dense", "link"}


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=" ".join)
def test_nor_is_another_model(model, tmp_path, capsys, more):
    other = model_folders.text_model(tmp_path / "other")
    before = contents(other)
    said = refused(capsys, "quantize", model, "--rtn", "w8a8", "-o", other, *more)
    assert "holds no quantized model" in said
    # Of a file of weights, of any of its names, and of anything else.
    hard = tmp_path / "hard.safetensors"
    os.link(other / "model.safetensors", hard)
    soft = tmp_path / "soft.safetensors"
    soft.symlink_to(other / "model.safetensors")
    for path in (other / "model.safetensors", hard, soft, other / "config.json"):
        said = refused(
            capsys, "calibrate", model, "synthetic", "-o", path, *CALIBRATE, *more
        )
        assert "is no recipe" in said
        said = refused(capsys, "eval", model, "synthetic", "-o", path, *more)
        assert "is no result of 'masquant eval'" in said
        said = refused(capsys, "analyze", model, "synthetic", "-o", path, *more)
        assert "is no result of 'masquant analyze'" in said
    assert contents(other) == before


def test_no_part_of_a_model_is_added_to_it(model, capsys):
    """transformers would take such a file before the shards that it has."""
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        said = refused(
            capsys, "calibrate", model, "synthetic", "-o", model / name, *CALIBRATE
        )
        assert "would take it for a part of its own" in said
    said = refused(
        capsys, "eval", model, "synthetic", "-o", model / "preprocessor_config.json"
    )
    assert "would take it for a part of its own" in said
    check_file(model / "recipe.safetensors", "recipe", sources=[model])


def test_nor_are_the_data_or_a_folder_of_other_files(model, tmp_path, capsys):
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"text": "some words"})
    before = data.read_bytes()
    said = refused(capsys, "eval", model, data, "-o", data, "--overwrite")
    assert "it is what is read" in said
    said = refused(capsys, "calibrate", model, data, "-o", data, *CALIBRATE)
    assert "it is what is read" in said
    assert data.read_bytes() == before
    said = refused(
        capsys, "quantize", model, "--rtn", "w8a8", "-o", tmp_path, "--overwrite"
    )
    assert "lies in it" in said
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    said = refused(
        capsys, "quantize", model, "--rtn", "w8a8", "-o", tmp_path / "notes",
        "--overwrite",
    )  # fmt: skip
    assert "holds no quantized model" in said
    said = refused(capsys, "demo", "--save", model, "--overwrite")
    assert "holds no result of 'masquant demo'" in said
    said = refused(capsys, "demo", "--json", data, "--overwrite")
    assert "is no result of 'masquant demo'" in said


@pytest.mark.parametrize("command", ["analyze", "demo"])
def test_nor_is_what_another_command_wrote(made, model, capsys, command):
    before = contents(made)
    path = made / "evaluation.json"
    given = {"analyze": [model, "synthetic", "-o"], "demo": ["--json"]}[command]
    said = refused(capsys, command, *given, path, "--overwrite")
    assert f"is no result of 'masquant {command}'" in said
    assert contents(made) == before


def test_a_device_is_no_file(model, capsys):
    said = refused(capsys, "eval", model, "synthetic", "-o", os.devnull, "--overwrite")
    assert "it is no ordinary file" in said


def test_an_output_where_nothing_can_be_is_told_first(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(
        capsys, "quantize", model, "--rtn", "w8a8", "-o", tmp_path / "file" / "q"
    )
    assert "'" + str(tmp_path / "file") + "' is a file" in said
    said = refused(capsys, "quantize", model, "--rtn", "w8a8", "-o", tmp_path / "file")
    assert "it is a file; give a folder" in said
    said = refused(
        capsys, "eval", tmp_path / "gone", "synthetic", "-o", tmp_path / "no" / "e.json"
    )
    assert "there is no folder" in said


# What is ours


def test_what_is_ours_is_written_over_when_it_is_said(made, tmp_path, capsys):
    folder = tmp_path / "made"
    shutil.copytree(made, folder, symlinks=True)
    model, recipe, out = (
        folder / "model",
        folder / "recipe.safetensors",
        folder / "quantized",
    )
    data = ["synthetic", "--max-samples", "1"]
    commands = {
        recipe: ["calibrate", model, "synthetic", "-o", recipe, *CALIBRATE],
        out: ["quantize", model, "--rtn", "w4a8", "-o", out],
        folder / "evaluation.json": [
            "eval", model, *data, "-o", folder / "evaluation.json"
        ],
        folder / "page.html": ["report", recipe, "-o", folder / "page.html"],
    }  # fmt: skip
    for path, command in commands.items():
        assert "add --overwrite, or give another name" in refused(capsys, *command)
        assert run(*command, "--overwrite") == 0, capsys.readouterr().err
        assert kind_of(path) == kind_of(made / path.name)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["formats"][0]["weight_bits"] == 4
    # Of another kind, it stays.
    said = refused(capsys, "eval", model, *data, "-o", recipe, "--overwrite")
    assert "is no result of 'masquant eval'" in said


def test_a_sequential_result_gives_way_to_another(model, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.safetensors", tmp_path / "q"
    command = ["calibrate", model, "synthetic", "--max-samples", "1", "--method", "rtn"]
    command += ["--sequential", "-o", recipe, "--quantized", out]
    assert run(*command) == 0
    # The same again is done already.
    assert run(*command) == 0
    other = [*command, "--scheme", "w8a8"]
    assert "is there already, and not a result of this calibration" in refused(
        capsys, *other
    )
    assert Recipe.load(recipe).scheme == "w4a8"
    assert run(*other, "--overwrite") == 0, capsys.readouterr().err
    assert Recipe.load(recipe).scheme == "w8a8"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["formats"][0]["weight_bits"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "models", "q", "recipe.safetensors"
    ]  # fmt: skip


def test_scores_are_shown_before_they_are_written(model, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    target = tmp_path / "e.json"
    words = ["eval", model, "synthetic", "--max-samples", "1", "-o", target]
    assert run(*words) == 1
    out, err = capsys.readouterr()
    assert "answers" in out and "No space left on device" in err


# From Python


def test_from_python_no_model_is_written_over(made, model):
    from torchao_masquant.evaluation import Evaluation

    before = contents(model)
    loaded = AutoModelForCausalLM.from_pretrained(made / "quantized")
    with pytest.raises(ValueError, match="holds no quantized model"):
        save_quantized(loaded, model)
    with pytest.raises(ValueError, match="lies in what is read"):
        save_quantized(loaded, model / "q", beside=model)
    recipe = Recipe.load(made / "recipe.safetensors")
    with pytest.raises(ValueError, match="is no recipe"):
        recipe.save(model / "model.safetensors")
    evaluation = Evaluation.load(made / "evaluation.json")
    with pytest.raises(ValueError, match="is no result"):
        evaluation.save(model / "config.json")
    assert contents(model) == before
    # Our own is replaced, and a processor that lies there already stays.
    new = model.parent / "new"
    new.mkdir()
    (new / "README.md").write_text("mine")
    for _ in range(2):
        save_quantized(loaded, new)
        assert kind_of(new) == "model"
        assert (new / "README.md").read_text() == "mine"


def test_other_kinds_of_safetensors_are_no_recipes(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no recipe"):
        check_file(tmp_path / "x.safetensors", "recipe")
    # Nothing is lost with an empty file, or an empty folder.
    (tmp_path / "empty").write_bytes(b"")
    check_file(tmp_path / "empty", "recipe", overwrite=False)
    (tmp_path / "folder").mkdir()
    check_folder(tmp_path / "folder", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_told_first(model, tmp_path, capsys):
    subprocess.run(["chmod", "a-w", tmp_path], check=True)
    said = refused(capsys, "quantize", model, "--rtn", "w8a8", "-o", tmp_path / "q")
    assert "is read-only" in said
