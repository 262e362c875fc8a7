# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``quantize MODEL DATA``, what the folder tells of it, and ``analyze``."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from running import printed, refused, run
from safetensors.torch import load_file

from torchao_masquant import Analysis, Recipe
from torchao_masquant.testing import model_folders

QUICK = ["--alpha", "0.5", "--separation", "1", "--rank", "2"]


def stored(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A model with a card of its own, and data."""
    folder = tmp_path_factory.mktemp("vision")
    model_folders.vision_model(folder / "model")
    (folder / "model" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\nbase_model: someone/else\n"
        "tags: [chat]\npipeline_tag: image-text-to-text\n---\n# The original\n"
    )
    return folder / "model", model_folders.vision_samples(folder)


@pytest.fixture(scope="module")
def two_steps(vision, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    recipe, out = folder / "recipe", folder / "quantized"
    assert run("calibrate", *vision, "-o", recipe, *QUICK) == 0
    assert run("quantize", vision[0], "--recipe", recipe, "-o", out) == 0
    return recipe, out


@pytest.mark.parametrize("more", [[], ["--sequential"]], ids=" ".join)
def test_one_step_is_two(vision, two_steps, tmp_path, capsys, more):
    recipe, expected = two_steps
    out = tmp_path / "quantized"
    told = printed(capsys, "quantize", *vision, "-o", out, *QUICK, *more)
    assert told["schemes"] == ["w4a8"] and told["methods"] == ["masquant"]
    first, second = stored(expected), stored(out)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert quantization(out) == quantization(expected)
    # Named after its folder, the card is otherwise the same.
    cards = [(f / "README.md").read_text() for f in (expected, out)]
    assert cards[0] == cards[1]


def test_a_recipe_tells_what_it_was_made_from(two_steps, capsys):
    recipe, out = two_steps
    about = Recipe.load(recipe).description
    assert about["model"] == "model" and about["data"] == "samples.jsonl"
    assert about["samples"] == 5
    # Counted by hand: 4 images of 16 tokens each.
    assert about["tokens"]["vision"] == 64 and about["tokens"]["text"] > 5
    told = printed(capsys, "inspect", recipe)
    assert told["kind"] == "recipe" and told["description"] == about
    told = printed(capsys, "inspect", out)
    assert told["description"] == about
    assert told["versions"]["torch"] == torch.__version__
    assert run("inspect", recipe) == 0
    assert "5 samples (" in capsys.readouterr().out


def test_a_card_tells_how_a_model_was_made(two_steps):
    _, out = two_steps
    card = ModelCard.load(out / "README.md")
    about = card.data.to_dict()
    assert about["base_model"] == "model"
    assert about["base_model_relation"] == "quantized"
    # The original's license goes on; what it was made from, and its tags, do not.
    assert about["license"] == "apache-2.0" and about["language"] == "en"
    assert about["pipeline_tag"] == "image-text-to-text"
    assert "chat" not in about["tags"]
    for words in ("w4a8", "masquant", "samples.jsonl", "| Samples | 5 |", "64 vision",
                  f"torch {torch.__version__}", "14 linears",
                  'LlavaForConditionalGeneration.from_pretrained("quantized")'):  # fmt: skip
        assert words in card.text
    assert "The original" not in card.text


def test_the_line_of_a_card_loads_the_model(two_steps, monkeypatch):
    _, out = two_steps
    monkeypatch.chdir(out.parent)
    text = (out / "README.md").read_text()
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert type(names["model"]).__name__ == "LlavaForConditionalGeneration"


def test_a_card_without_data_tells_no_data(vision, tmp_path):
    out = tmp_path / "q"
    assert run("quantize", vision[0], "--rtn", "w8a8", "-o", out) == 0
    text = (out / "README.md").read_text()
    assert "| Method | rtn |" in text and "Samples" not in text
    assert "torch " in text and "rank" not in text


def test_scores_go_onto_the_card_once(vision, tmp_path, capsys):
    out = tmp_path / "q"
    assert run("quantize", vision[0], "--rtn", "w8a8", "-o", out) == 0
    before = (out / "README.md").read_text()
    for _ in range(2):
        assert run("eval", out, vision[1], "--card", "--max-samples", "2") == 0
    text = (out / "README.md").read_text()
    assert text.startswith(before.rstrip()) and text.count("## Scores") == 1
    assert "On samples.jsonl" in text
    with pytest.raises(SystemExit) as ended:
        run("eval", vision[0], vision[1], "--card")
    assert ended.value.code == 2


# Before the model is loaded


@pytest.fixture
def unloaded(monkeypatch):
    """A model that is loaded is an error of its own."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    for command in ("calibrate", "quantize", "analyze", "eval"):
        monkeypatch.setattr(f"torchao_masquant.cli.{command}.load_model", load)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--exclude", "*.none"], "matches no linear"),
        (["--modalities", "text,audio"], "not audio"),
        (["--base-modality", "audio"], "'audio' is not one of the modalities"),
        (
            ["--modality-weights", "smell=1"],
            "'smell', which is not one of the modalities",
        ),
        (["--group-size", "24"], "of 12 of 14 linears"),
        (["--hadamard-size", "32"], "of 2 of 14 linears"),
        (["--scheme", "w4a16"], "group_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_compared_with_the_model_first(
    vision, tmp_path, capsys, unloaded, options, words
):
    for command in ("calibrate", "quantize"):
        said = refused(capsys, command, *vision, "-o", tmp_path / "out", *options)
        assert words in said and not list(tmp_path.iterdir())


def test_a_recipe_is_compared_with_the_model_first(
    vision, two_steps, tmp_path, capsys, unloaded
):
    recipe, quantized = two_steps
    other = model_folders.vision_model(tmp_path / "other")
    from safetensors.torch import save_file

    # Another training of the same architecture.
    weights = load_file(other / "model.safetensors")
    save_file(
        {n: t + 0.01 for n, t in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    out = tmp_path / "out"
    said = refused(capsys, "quantize", other, "--recipe", recipe, "-o", out)
    assert "made for a weight with fingerprint" in said
    own = ["quantize", vision[0], "--recipe", recipe, "-o", out]
    assert "in the same dtype" in refused(capsys, *own, "--dtype", "float16")
    assert "'*.no'" in refused(capsys, *own, "--include", "*.no")
    said = refused(capsys, "quantize", vision[0], "--rtn", "w4a16", "-o", out)
    assert "14 of 14 linears" in said and "group_size" in said
    text = model_folders.text_model(tmp_path / "text")
    said = refused(capsys, "quantize", text, "--recipe", recipe, "-o", out)
    assert "declares the modalities ('text',), not vision" in said
    said = refused(capsys, "calibrate", quantized, "synthetic", "-o", out)
    assert "is quantized already" in said
    assert not out.exists()


# Analyze


def test_an_analysis_is_printed_and_written(vision, tmp_path, capsys):
    target = tmp_path / "analysis.json"
    only = ["--include", "*language_model*.q_proj", "--ranks", "0,0.5"]
    assert run("analyze", *vision, "-o", target, *only) == 0
    analysis = Analysis.load(target)
    assert analysis.modalities == ("text", "vision") and len(analysis.inputs) == 2
    assert analysis.ranks == (0.0, 0.5)
    assert str(analysis) in capsys.readouterr().out
    told = printed(capsys, "analyze", *vision, *only)
    assert Analysis.from_json(told).inputs.keys() == analysis.inputs.keys()


def test_an_analysis_is_refused_early(vision, two_steps, tmp_path, capsys, unloaded):
    said = refused(capsys, "analyze", two_steps[1], vision[1])
    assert "is quantized already" in said
    said = refused(capsys, "analyze", *vision, "--include", "*.none")
    assert "matches no linear" in said
    said = refused(capsys, "analyze", *vision, "--modalities", "text,audio")
    assert "not audio" in said
    said = refused(capsys, "analyze", *vision, "-o", tmp_path)
    assert "it is a folder" in said
