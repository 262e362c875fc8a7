# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model folder and data to a recipe, to integers, to scores: each step a command."""

import json

import pytest
import safetensors
import torch
from running import printed, run
from transformers import AutoModelForMultimodalLM

from torchao_masquant import MASQuantLinear, Recipe
from torchao_masquant.testing import model_folders

# One exponent and no search: the steps are what is looked at.
QUICK = ["--alpha", "0.5", "--separation", "1", "--rank", "2"]


CASES = {
    "vision": (
        model_folders.vision_model,
        model_folders.vision_samples,
        ["text", "vision"],
        {"answers": 4, "all text": 1},
    ),
    "audio": (
        model_folders.audio_model,
        model_folders.audio_samples,
        ["text", "audio"],
        {"answers": 3},
    ),
}


@pytest.mark.parametrize("make, write, modalities, tasks", CASES.values(), ids=CASES)
def test_each_step_follows_the_one_before(
    tmp_path, capsys, make, write, modalities, tasks
):
    model = make(tmp_path / "model")
    data = write(tmp_path)
    recipe, out = tmp_path / "recipe.safetensors", tmp_path / "quantized"

    told = printed(capsys, "calibrate", model, data, "-o", recipe, *QUICK)
    assert told["modalities"] == modalities and told["linears"] == 14
    assert told["samples"] == sum(tasks.values())
    assert told["bytes"] == Recipe.load(recipe).nbytes

    told = printed(capsys, "quantize", model, "--recipe", recipe, "-o", out)
    assert told["schemes"] == ["w4a8"] and told["methods"] == ["masquant"]
    # The processor comes along, the original weights do not; and a model card.
    names = {path.name for path in model.iterdir()} | {"README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert "processor_config.json" in names

    told = printed(capsys, "inspect", out)
    assert told["quantized_linears"] == 14 and told["modalities"] == modalities
    assert all(line["ranks"] == {modalities[1]: 2} for line in told["linears"])
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())
    assert told["quantized_bytes"] + told["other_bytes"] == stored
    loaded = AutoModelForMultimodalLM.from_pretrained(out)
    linears = [m for m in loaded.modules() if isinstance(m, MASQuantLinear)]
    assert told["quantized_bytes"] == sum(m.weight.nbytes_stored for m in linears)

    report = tmp_path / "evaluation.json"
    told = printed(capsys, "eval", out, data, "--reference", model, "-o", report)
    assert {name: t["examples"] for name, t in told["tasks"].items()} == tasks
    assert told["quantized_linears"] == 14
    assert 0 < told["by_modality"][modalities[1]]["kl"] < 0.5
    assert told == json.loads(report.read_text())

    told = printed(capsys, "bench", model, out, "--eager", "--rounds", 1, "--tokens", 8)
    calls = [row["call"] for row in told["rows"]]
    assert calls == ["prefill, base", "prefill, mixed", "decode"]
    for row in told["rows"]:
        assert row["dense_ms"] > 0 and row["quantized_ms"] > 0
        assert row["ratio"] == row["dense_ms"] / row["quantized_ms"]


def test_a_model_that_reads_needs_no_data_of_its_own(tmp_path, capsys):
    model = model_folders.text_model(tmp_path / "model")
    recipe, out = tmp_path / "recipe.safetensors", tmp_path / "quantized"
    told = printed(
        capsys, "calibrate", model, "synthetic", "-o", recipe, "--max-samples", 4,
        "--method", "smoothquant", "--include", "*.mlp.*", "--exclude", "*.0.*",
    )  # fmt: skip
    assert told["modalities"] == ["text"] and told["samples"] == 4
    assert told["linears"] == 3
    printed(capsys, "quantize", model, "--recipe", recipe, "-o", out)
    told = printed(capsys, "eval", out, "synthetic", "--max-samples", 2)
    assert told["tasks"]["answers"]["examples"] == 2


def test_rounding_to_nearest_needs_no_recipe(tmp_path, capsys):
    out = tmp_path / "quantized"
    told = printed(
        capsys, "quantize", "digits", "--rtn", "w8a8", "--head-bits", "8", "-o", out
    )
    assert told["methods"] == ["rtn"] and told["schemes"] == ["w8a8"]
    told = printed(capsys, "eval", out, "digits", "--max-samples", 20)
    assert {name: t["examples"] for name, t in told["tasks"].items()} == {
        "image": 20,
        "audio": 20,
        "both": 20,
        "text": 20,
    }
    assert told["tasks"]["text"]["accuracy"] == 1


def test_modality_weights_are_measured_on_request(tmp_path, capsys):
    model = model_folders.vision_model(tmp_path / "model")
    data = model_folders.vision_samples(tmp_path, 2)
    recipe = tmp_path / "recipe.safetensors"
    printed(
        capsys, "calibrate", model, data, "-o", recipe, *QUICK,
        "--include", r"re:model\.(language_model\.)?layers.*\.k_proj", "--modality-weights", "measure",
    )  # fmt: skip
    weights = Recipe.load(recipe).options.modality_weights
    assert weights["text"] == 1 and weights["vision"] > 0


def test_tables_are_for_people(tmp_path, capsys):
    model = model_folders.vision_model(tmp_path / "model")
    out = tmp_path / "quantized"
    assert run("quantize", model, "--rtn", "w4a16", "--include", "*.down_proj",
               "-o", out) == 1  # fmt: skip
    assert "group_size" in capsys.readouterr().err
    assert not out.exists()
    assert run("quantize", model, "--rtn", "w8a8", "-o", out) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0
    text = capsys.readouterr().out
    assert "mlp.down_proj" in text and "2 x" in text and "32 x 48" in text
    assert run("inspect", out, "--layers") == 0
    assert "1.mlp.down_proj" in capsys.readouterr().out


def test_loaded_weights_are_what_python_makes(tmp_path, capsys):
    from torchao.quantization import quantize_

    from torchao_masquant import masquant_config

    folder = model_folders.vision_model(tmp_path / "model")
    data = model_folders.vision_samples(tmp_path, 2)
    recipe, out = tmp_path / "recipe.safetensors", tmp_path / "quantized"
    assert run("calibrate", folder, data, "-o", recipe, *QUICK,
               "--include", r"re:model\.(language_model\.)?layers.*\.q_proj") == 0  # fmt: skip
    assert run("quantize", folder, "--recipe", recipe, "-o", out) == 0
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    quantize_(model, masquant_config(recipe))
    loaded = AutoModelForMultimodalLM.from_pretrained(out)
    for expected, found in zip(model.parameters(), loaded.parameters()):
        for a, b in zip(_parts(expected.data), _parts(found.data)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def _parts(tensor):
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor]
