# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant calibrate --sequential``: the same data, the same result, from disk."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny_models
import torch
from running import run
from safetensors.torch import load_file

from torchao_masquant import Recipe
from torchao_masquant.testing import model_folders

QUICK = ["--alpha", "0.5", "--separation", "1", "--rank", "2"]


def assert_same_recipe(path, other):
    first, second = Recipe.load(path), Recipe.load(other)
    assert first.options == second.options and first.modalities == second.modalities
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        tensors = second.layers[name].tensors()
        assert layer.tensors().keys() == tensors.keys()
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, tensors[key]), (name, key)


def stored(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A model with a processor, and data for it."""
    folder = tmp_path_factory.mktemp("vision")
    model_folders.vision_model(folder / "model")
    return folder / "model", model_folders.vision_samples(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model without a processor, and its inputs in both forms."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_models.qwen25_vl(2).save_pretrained(folder / "model")
    samples = tiny_models.samples(audio=False)
    torch.save(samples, folder / "samples.pt")
    (folder / "samples").mkdir()
    for index, sample in enumerate(samples):
        torch.save(sample, folder / "samples" / f"{index:03d}.pt")
    return folder


@pytest.fixture
def expected(tmp_path):
    return tmp_path / "expected.safetensors"


@pytest.fixture
def recipe(tmp_path):
    return tmp_path / "recipe.safetensors"


def test_it_is_calibrate_and_quantize(vision, tmp_path, capsys, expected, recipe):
    model, data = vision
    options = [*QUICK, "--dtype", "bfloat16", "--modality-weights", "vision=0.5"]
    assert run("calibrate", model, data, "-o", expected, *options) == 0
    quantize = ["quantize", model, "--recipe", expected, "-o", tmp_path / "expected"]
    assert run(*quantize, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    both = ["--sequential", "-o", recipe, "--quantized", tmp_path / "q", "--json"]
    assert run("calibrate", model, data, *both, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["blocks"], told["resumed"], told["samples"]) == (2, 0, 5)
    assert told["bytes"] > recipe.stat().st_size
    assert_same_recipe(expected, recipe)
    found, by_parts = stored(tmp_path / "expected"), stored(tmp_path / "q")
    assert found.keys() == by_parts.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, by_parts[name]), name
    # The processor has come along.
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert names >= {"processor_config.json", "tokenizer.json", "chat_template.jinja"}


def test_the_digits_model(capsys, expected, recipe):
    """Its name, and its data, stand for files that come along."""
    options = ["--method", "smoothquant", "--max-samples", "2"]
    options += ["--include", r"re:model\.(language_model\.)?layers\.1\..*"]
    assert run("calibrate", "digits", "digits", "-o", expected, *options) == 0
    more = ["--sequential", "--activations", "disk", "-o", recipe]
    assert run("calibrate", "digits", "digits", *more, *options) == 0
    assert f"Wrote {recipe}" in capsys.readouterr().out
    assert_same_recipe(expected, recipe)


def test_inputs_that_are_made_already(saved, expected, recipe):
    """In one file or in several."""
    options = [*QUICK, "--max-samples", "3", "--hadamard-size", "8"]
    options += ["--epochs", "1", "--lr", "0.001", "--batch-size", "2"]
    model = ["calibrate", saved / "model"]
    assert run(*model, saved / "samples.pt", *options, "-o", expected) == 0
    more = ["-o", recipe, "--sequential"]
    assert run(*model, saved / "samples", *options, *more) == 0
    assert_same_recipe(expected, recipe)
    found = Recipe.load(recipe)
    assert (found.options.batch_size, found.options.hadamard_size) == (2, 8)
    assert {layer.hadamard_size for layer in found.layers.values()} == {8}


@pytest.mark.slow
def test_two_processes(saved, tmp_path, monkeypatch, capsys, expected, recipe):
    """As torchrun starts them, this being one; what they find differs by rounding."""
    arguments = ["calibrate", saved / "model", saved / "samples.pt", *QUICK]
    arguments += ["--sequential"]
    assert run(*arguments, "-o", expected) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words = [str(word) for word in (*arguments, "-o", recipe)]
    other = subprocess.Popen(
        [sys.executable, "-m", "torchao_masquant", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **told, "RANK": "1", "LOCAL_RANK": "1"},
    )
    for name, value in {**told, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert run(*words) == 0
    said, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    # One speaks for both.
    assert "Wrote " in capsys.readouterr().out and said == ""
    found, alone = Recipe.load(recipe), Recipe.load(expected)
    assert list(found.layers) == list(alone.layers)
    for name, layer in alone.layers.items():
        factor = found.layers[name].smoothing_factor
        largest = layer.smoothing_factor.abs().max()
        assert (factor - layer.smoothing_factor).abs().max() <= 2.0**-22 * largest


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "are required: -o/--output.\n"),
        (["--sequential"], "are required: -o/--output or --quantized"),
        (["-o", "r", "--quantized", "q"], "--quantized goes with --sequential"),
        (["-o", "r", "--max-hours", "2"], "--max-hours goes with --sequential"),
        (["-o", "r", "--activations", "disk"], "--activations goes with"),
        (
            ["--sequential", "-o", "r", "--modality-weights", "measure"],
            "which --sequential never holds",
        ),
        (
            ["--sequential", "-o", "r", "--trust-remote-code"],
            "transformers' own classes alone",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(vision, capsys, options, message):
    with pytest.raises(SystemExit) as raised:
        run("calibrate", *vision, *options)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_processes_without_it_are_refused(vision, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run("calibrate", *vision, "-o", "r")
    assert "share a calibration with --sequential alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantized", "/no/such/folder"], "there is no folder '/no/such'"),
        (["--quantized", "q", "--max-memory-gib", "0.1"], "GiB of memory"),
        (["-o", "r", "--exclude", "*.none"], "matches no linear"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_sentence(
    vision, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("calibrate", *vision, "--sequential", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())
