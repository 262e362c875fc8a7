# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``masquant calibrate-sequential``."""

import pytest
import tiny_models
import torch

from torchao_masquant.__main__ import main
from torchao_masquant.recipe import Recipe
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.sequential.saved_samples import SavedSamples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and its samples in both forms."""
    folder = tmp_path_factory.mktemp("files")
    tiny_models.qwen25_vl(2).save_pretrained(folder / "model")
    samples = tiny_models.samples(audio=False)
    torch.save(samples, folder / "samples.pt")
    (folder / "samples").mkdir()
    for index, sample in enumerate(samples):
        torch.save(sample, folder / "samples" / f"{index:03d}.pt")
    return folder


def command(folder, *more, samples="samples.pt"):
    return main(
        [
            "calibrate-sequential",
            str(folder / "model"),
            f"--samples={folder / samples}",
            "--device=cpu",
            "--alpha=0.5",
            "--separation=1.0",
            *more,
        ]
    )


@pytest.mark.parametrize("samples", ["samples.pt", "samples"])
def test_it_writes_what_the_function_writes(folder, tmp_path, capsys, samples):
    recipe = tmp_path / "recipe.safetensors"
    options = ["--rank=2", "--modality-weight", "vision=0.5", "--exclude=*.o_proj"]
    assert command(folder, f"--recipe={recipe}", *options, samples=samples) == 0
    assert f"GiB in {recipe}" in capsys.readouterr().out
    calibrate_sequential(
        folder / "model",
        tiny_models.samples(audio=False),
        recipe=tmp_path / "expected.safetensors",
        rank=2,
        alpha=0.5,
        separation=1.0,
        modality_weights={"vision": 0.5},
        exclude="*.o_proj",
        progress=False,
    )
    found, expected = (
        Recipe.load(recipe),
        Recipe.load(tmp_path / "expected.safetensors"),
    )
    assert found.options == expected.options
    for name, layer in expected.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, found.layers[name].tensors()[key])


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "name what to write"),
        (["--output=/no/such/folder"], "there is no folder '/no/such'"),
        (["--output=q", "--rank=auto", "--method=rtn"], "kept as it was published"),
        (["--output=q", "--max-memory-gib=0.1"], "GiB of memory"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    folder, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    assert command(folder, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("calibrate-sequential: ") and message in error
    assert "Traceback" not in error and not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--rank=many", "'many' is neither a number nor 'auto'"),
        ("--modality-weight=vision", "not of the form modality=number"),
        ("--scheme=w1a1", "invalid choice"),
    ],
)
def test_options_that_cannot_be_read(folder, capsys, option, message):
    with pytest.raises(SystemExit):
        command(folder, option)
    assert message in capsys.readouterr().err


def test_samples_that_are_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no samples"):
        SavedSamples(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no \\*.pt file"):
        SavedSamples(tmp_path)
    # More than once, and the same each time.
    samples = SavedSamples(folder / "samples")
    first, second = list(samples), list(samples)
    assert torch.equal(first[1]["input_ids"], second[1]["input_ids"])
