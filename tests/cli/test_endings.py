# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How a command ends: exit codes, one sentence, advice, and nothing half-written."""

import json
import os
import shutil

import pytest
from running import refused, run
from transformers import modeling_utils

from torchao_masquant import recipe
from torchao_masquant.cli.ending import run as run_command
from torchao_masquant.testing import model_folders


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return model_folders.vision_model(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="module")
def quantized(vision):
    """The same, quantized; not to be changed."""
    out = vision.parent / "quantized"
    assert run("quantize", vision, "--rtn", "w8a8", "-o", out) == 0
    return out


# Usage


@pytest.mark.parametrize(
    "arguments, advice",
    [
        (["calibarte"], "did you mean 'calibrate'?"),
        (["calibrate", "m", "d", "-o", "r", "--shceme", "w4a8"], "mean '--scheme'?"),
        (["calibrate", "m", "d", "-o", "r", "--scheme", "w4a9"], "mean 'w4a8'?"),
        (["inspect", "m", "--jsn"], "mean '--json'?"),
        (["inspect", "m", "--layer"], "mean '--layers'?"),
    ],
)
def test_a_typo_gets_advice(capsys, arguments, advice):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["calibrate", "model", "data"],
        ["quantize", "model", "-o", "out"],
        ["quantize", "model", "-o", "out", "--recipe", "r", "--rtn", "w8a8"],
        ["calibrate", "m", "d", "-o", "r", "--rank", "much"],
        ["calibrate", "m", "d", "-o", "r", "--max-samples", "0"],
        ["calibrate", "m", "d", "-o", "r", "--modality-weights", "vision:1"],
        ["calibrate", "m", "d", "-o", "r", "--rank", "1.5"],
        ["calibrate", "m", "d", "-o", "r", "--rank", "-3"],
        ["calibrate", "m", "d", "-o", "r", "--alpha", "7"],
        ["calibrate", "m", "d", "-o", "r", "--group-size", "1"],
        ["calibrate", "m", "d", "-o", "r", "--hadamard-size", "48"],
        ["quantize", "m", "d", "-o", "out", "--hadamard-size", "0"],
        ["calibrate", "m", "d", "-o", "r", "--method", "rtn", "--hadamard-size", "8"],
        ["calibrate", "m", "d", "-o", "r", "--lr", "nan"],
        ["calibrate", "m", "d", "-o", "r", "--epochs", "-1"],
        ["calibrate", "m", "d", "-o", "r", "--method", "rtn", "--epochs", "1"],
        ["calibrate", "m", "d", "-o", "r", "--modality-weights", "vision=-1"],
        ["calibrate", "m", "d", "-o", "r", "--modality-weights", "text=1,text=2"],
        ["calibrate", "m", "d", "-o", "r", "--modalities", "vision,"],
        ["calibrate", "m", "d", "-o", "r", "--modalities", "vision,audio"],
        ["calibrate", "m", "d", "-o", "r", "--max-statistics-bytes", "-1"],
        ["calibrate", "m", "d", "--sequential", "-o", "r", "--max-hours", "nan"],
        ["quantize", "m", "d", "-o", "out", "--rtn", "w8a8"],
        ["quantize", "m", "d", "-o", "out", "--recipe", "r"],
        ["quantize", "m", "-o", "out", "--rtn", "w8a8", "--alpha", "0.5"],
        ["quantize", "m", "-o", "out", "--rtn", "w8a8", "--sequential"],
        ["quantize", "m", "d", "-o", "out", "--max-hours", "2"],
        ["quantize", "m", "-o", "out", "--rtn", "w8a8", "--max-shard-size", "2XB"],
        ["quantize", "m", "d", "-o", "out", "--include", "re:["],
        ["quantize", "m", "d", "more", "-o", "out"],
        ["analyze", "m", "d", "--alpha", "2"],
        ["analyze", "m", "d", "--ranks", "0,3"],
        ["bench", "m", "q", "--tokens", "0"],
        ["bench", "m", "q", "--rounds", "many"],
        ["tune", "q", "--tokens", "0", "16"],
        ["completion", "perl"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_two(capsys, monkeypatch, tmp_path, arguments):
    """And with one sentence, not with the usage of all that is right."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and not list(tmp_path.iterdir())
    if arguments:
        (line,) = err.splitlines()
        assert line.startswith("error: ") and line.endswith(".")


def test_data_may_stand_behind_options(capsys, tmp_path):
    said = refused(capsys, "quantize", tmp_path / "m", "-o", tmp_path / "q", "d")
    assert "there is no folder" in said


def test_without_arguments_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        run()
    assert "quantize a small model" in capsys.readouterr().err


COMMANDS = ("calibrate", "quantize", "eval", "analyze", "inspect", "bench", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"masquant {command} " in out.partition("examples:")[2]
    described = out.partition("positional arguments:")[2] or out
    assert max(map(len, described.splitlines())) <= 90


# One sentence


def test_any_error_is_one_sentence_unless_it_is_looked_for(capsys, monkeypatch):
    def fail(arguments):
        raise KeyError("a\n  key")

    def parsed(debug):
        return type("Arguments", (), {"debug": debug})()

    assert run_command(fail, parsed(False)) == 1
    assert capsys.readouterr().err == "error: KeyError: a key.\n"
    with pytest.raises(KeyError):
        run_command(fail, parsed(True))
    with pytest.raises(FileNotFoundError):
        run("inspect", "nowhere", "--debug")
    monkeypatch.setenv("MASQUANT_DEBUG", "1")
    with pytest.raises(KeyError):
        run_command(fail, parsed(False))


def test_an_interruption_ends_with_130(capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    assert run_command(interrupt, type("Arguments", (), {})()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    said = refused(
        capsys, "calibrate", tmp_path / "nowhere", "synthetic", "-o", tmp_path / "r"
    )
    assert "there is no folder" in said and "'owner/name'" in said
    (tmp_path / "empty").mkdir()
    said = refused(
        capsys, "calibrate", tmp_path / "empty", "synthetic", "-o", tmp_path / "r"
    )
    assert "has no config.json" in said
    said = refused(capsys, "calibrate", "owner/name", "synthetic", "-o", tmp_path / "r")
    assert "'owner/name' is no folder here" in said and "no network" in said


def test_a_target_that_cannot_be_written_is_told_first(vision, tmp_path, capsys):
    # The data is not looked at: it would be told if it were.
    said = refused(
        capsys, "calibrate", vision, "nowhere", "-o", tmp_path / "no" / "r.safetensors"
    )
    assert "there is no folder" in said
    said = refused(capsys, "calibrate", vision, "nowhere", "-o", tmp_path)
    assert "it is a folder" in said


def test_wrong_data_is_told_before_the_model_is_loaded(
    vision, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torchao_masquant.cli.calibrate.load_model", None)
    data = model_folders.write_lines(tmp_path / "a.jsonl", {"image": "gone.png"})
    said = refused(capsys, "calibrate", vision, data, "-o", tmp_path / "r")
    assert "a.jsonl, line 1: there is no image" in said
    model_folders.write_sound(tmp_path / "a.wav")
    row = {"audio": "a.wav", "prompt": "What is it?"}
    data = model_folders.write_lines(tmp_path / "a.jsonl", row)
    said = refused(capsys, "calibrate", vision, data, "-o", tmp_path / "r")
    assert "line 1 has an audio" in said


def test_a_model_without_a_processor_is_told(vision, tmp_path, capsys):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(vision / name)
    said = refused(capsys, "calibrate", tmp_path, "synthetic", "-o", tmp_path / "r")
    assert "has no processor that can be loaded" in said


def test_digits_are_for_the_model_that_reads_them(vision, tmp_path, capsys):
    said = refused(capsys, "calibrate", vision, "digits", "-o", tmp_path / "r")
    assert "for the model 'digits' alone" in said
    said = refused(capsys, "calibrate", "digits", "synthetic", "-o", tmp_path / "r")
    assert said.endswith("has no processor: give it the data 'digits'.")


def test_a_device_that_is_not_there_is_named(vision, tmp_path, capsys):
    said = refused(
        capsys, "quantize", vision, "--rtn", "w8a8", "-o", tmp_path / "q",
        "--device", "cuda:99",
    )  # fmt: skip
    assert "there is no device 'cuda:99' here" in said


def test_tilings_are_tuned_on_a_gpu_alone(vision, capsys):
    said = refused(capsys, "tune", vision, "--device", "cpu")
    assert "this would run on cpu: there is nothing to tune" in said


def test_what_is_quantized_is_not_quantized_again(vision, quantized, tmp_path, capsys):
    again = tmp_path / "again"
    said = refused(capsys, "quantize", quantized, "--rtn", "w8a8", "-o", again)
    assert "is quantized already" in said
    said = refused(capsys, "bench", quantized, vision)
    assert "give the original model first" in said


def test_bench_refuses_a_model_that_is_not_the_original(
    vision, quantized, tmp_path, capsys
):
    other = model_folders.text_model(tmp_path / "text")
    said = refused(capsys, "bench", other, quantized)
    assert "a 'qwen2' model" in said and "the same model quantized" in said
    # Of the same kind, with a layer less.
    less = shutil.copytree(vision, tmp_path / "less")
    config = json.loads((less / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (less / "config.json").write_text(json.dumps(config))
    assert "of another architecture" in refused(capsys, "bench", less, quantized)


# Broken checkpoints and recipes


def _damaged(folder, damage):
    config = json.loads((folder / "config.json").read_text())
    damage(config)
    (folder / "config.json").write_text(json.dumps(config))


def _index(folder, text):
    """Put an index in the place of the file that transformers looks for before it."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


DAMAGES = {
    "not quantized": (
        lambda f: _damaged(f, lambda c: c.pop("quantization_config")),
        "is not quantized",
    ),
    "by another method": (
        lambda f: _damaged(
            f, lambda c: c["quantization_config"].update(quant_method="gptq")
        ),
        "is quantized by 'gptq'",
    ),
    "of a later format": (
        lambda f: _damaged(
            f, lambda c: c["quantization_config"].update(format_version=99)
        ),
        "upgrade it",
    ),
    "a layer less": (
        lambda f: _damaged(f, lambda c: c["quantization_config"]["layers"].popitem()),
        "config.json tells of 13",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is no JSON file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither"),
    "cut off": (
        lambda f: os.truncate(f / "model.safetensors", 2000),
        "cut off or damaged",
    ),
    "a missing shard": (
        lambda f: _index(
            f, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors is not there",
    ),
    "a way out of the folder": (
        lambda f: _index(f, '{"weight_map": {"a": "../../secret.safetensors"}}'),
        "'../../secret.safetensors' is no file of this folder",
    ),
    "an index of another form": (lambda f: _index(f, "[]"), "is damaged"),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_inspect_tells_what_is_wrong(quantized, tmp_path, capsys, damage, words):
    out = shutil.copytree(quantized, tmp_path / "q")
    damage(out)
    assert words in refused(capsys, "inspect", out)


def test_inspect_refuses_what_is_no_recipe(vision, tmp_path, capsys):
    assert "there is no" in refused(capsys, "inspect", tmp_path / "nowhere")
    said = refused(capsys, "inspect", vision / "model.safetensors")
    assert "but no MASQuant recipe" in said
    (tmp_path / "text").write_text("no recipe at all")
    assert "is no recipe" in refused(capsys, "inspect", tmp_path / "text")


def test_a_recipe_for_another_model_is_refused(vision, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.safetensors", tmp_path / "q"
    other = model_folders.text_model(tmp_path / "text")
    assert run(
        "calibrate", other, "synthetic", "-o", recipe, "--method", "rtn",
        "--max-samples", "1",
    ) == 0  # fmt: skip
    said = refused(capsys, "quantize", vision, "--recipe", recipe, "-o", out)
    assert "use the model that it was made for" in said
    assert not out.exists()
    said = refused(capsys, "quantize", vision, "--recipe", tmp_path / "gone", "-o", out)
    assert "there is no recipe file" in said


# Ctrl-C


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_an_interrupted_command_leaves_what_was_there(
    vision, tmp_path, capsys, monkeypatch, command
):
    """Interrupted at the worst moment: all is written, and has no name yet."""
    target = tmp_path / "target"
    if command == "calibrate":
        arguments = ["calibrate", vision, "synthetic", "-o", target]
        arguments += ["--method", "rtn", "--max-samples", "1"]
    else:
        arguments = ["quantize", vision, "--rtn", "w8a8", "-o", target]
    assert run(*arguments) == 0
    held = target if command == "calibrate" else target / "model.safetensors"
    old = held.read_bytes()
    # Of other bytes than what is written next.
    arguments += ["--overwrite", "--include", "*language_model*.q_proj"]
    written = []

    def stopped_after(write):
        def stop(tensors, path, *args, **kwargs):
            write(tensors, path, *args, **kwargs)
            written.append(path)
            raise KeyboardInterrupt

        return stop

    for module, name in ((recipe, "save_file"), (modeling_utils, "safe_save_file")):
        monkeypatch.setattr(module, name, stopped_after(getattr(module, name)))
    capsys.readouterr()
    assert run(*arguments) == 130
    out, err = capsys.readouterr()
    assert len(written) == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted: nothing is left half-written."
    assert held.read_bytes() == old
    assert os.listdir(tmp_path) == ["target"]
