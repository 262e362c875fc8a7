# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate_sequential`` is ``calibrate``, ``quantize_`` and ``save_pretrained``."""

import pytest
import tiny_models
import torch
from checkpoints import assert_same_recipe
from results import FIXED, assert_same_checkpoint
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLForConditionalGeneration

from torchao_masquant import Recipe, calibrate, masquant_config
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.sequential.decoder_walk import DecoderWalk
from torchao_masquant.sequential.disk_model import DiskModel

LAYERS = 3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny Qwen2.5-VL in several files."""
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_models.qwen25_vl(LAYERS).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def samples():
    return tiny_models.samples(audio=False)


def in_memory(folder, samples, output, **options):
    """The same by the functions for a model in memory."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=options.pop("dtype", "auto")
    )
    recipe = calibrate(model, samples, **{**FIXED, **options})
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(output)
    return recipe


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "disk"},
        {"scheme": "w4a16", "group_size": 16, "rounding": "nearest"},
        {"method": "smoothquant", "scheme": "w8a8", "alpha": None},
        {"method": "rtn", "dtype": torch.bfloat16, "rank": 0, "separation": None},
        {"low_rank_bits": 8, "exclude": ["*.layers.1.*", "*.down_proj"]},
        {"max_statistics_bytes": 200_000, "alpha": None, "include": "*.layers.1.*"},
        {"base_modality": "vision", "modality_weights": {"text": 0.5}},
        {"epochs": 1, "lr": 3e-3, "head_bits": 8},
        {"asymmetric_calibration": True, "exclude": "*.layers.1.mlp.*"},
        {"asymmetric_calibration": True, "epochs": 1, "lr": 3e-3, "rank": 0},
    ],
    ids=lambda o: " ".join(o),
)
def test_it_is_what_is_made_in_memory(original, samples, tmp_path, options):
    done = calibrate_sequential(
        original,
        samples,
        output=tmp_path / "quantized",
        recipe=tmp_path / "recipe.safetensors",
        **{**FIXED, **options},
    )
    options.pop("activations", None)
    recipe = in_memory(original, samples, tmp_path / "expected", **options)
    assert_same_recipe(recipe, Recipe.load(tmp_path / "recipe.safetensors"))
    assert_same_checkpoint(tmp_path / "expected", tmp_path / "quantized")
    assert (done.blocks, done.resumed, len(done.seconds)) == (LAYERS, 0, LAYERS)
    assert not list(tmp_path.glob("*.partial"))


def test_padding_and_samples_of_one_modality(original, tmp_path):
    """Kinds of samples differ in their inputs; each is proven by its longest."""
    text = tiny_models.batch([1, *tiny_models.words(9)], [1, *tiny_models.words(4)])
    samples = [*tiny_models.samples(audio=False, count=2), text]
    calibrate_sequential(original, samples, recipe=tmp_path / "r.safetensors", **FIXED)
    recipe = in_memory(original, samples, tmp_path / "expected")
    assert_same_recipe(recipe, Recipe.load(tmp_path / "r.safetensors"))


def test_tied_weights(samples, tmp_path):
    model = tiny_models.qwen25_vl(2)
    model.config.tie_word_embeddings = True
    model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    calibrate_sequential(tmp_path / "model", samples, output=tmp_path / "q", **FIXED)
    in_memory(tmp_path / "model", samples, tmp_path / "expected")
    assert_same_checkpoint(tmp_path / "expected", tmp_path / "q")


def test_one_block_is_loaded_at_a_time(original, samples, tmp_path, monkeypatch):
    """At no time is more than one block, or the front of the model, off the meta device."""
    most = 0
    disk = {}
    load, run = DiskModel._load, DecoderWalk.run_block

    def resident():
        nonlocal most
        model = disk["model"]
        blocks = {
            name.split(".layers.")[1].split(".")[0]
            for name, p in model.named_parameters()
            if ".layers." in name and not p.is_meta
        }
        most = max(most, len(blocks))
        front = {
            name
            for name, p in model.named_parameters()
            if not p.is_meta and (".visual." in name or "embed_tokens" in name)
        }
        assert not (front and len(blocks) > 1)
        return front

    def watched_load(self, keys):
        load(self, keys)
        disk["model"] = self.model
        resident()

    def watched_run(self, *arguments):
        assert not resident()
        return run(self, *arguments)

    monkeypatch.setattr(DiskModel, "_load", watched_load)
    monkeypatch.setattr(DecoderWalk, "run_block", watched_run)
    calibrate_sequential(original, samples, output=tmp_path / "q", **FIXED)
    assert most == 1


def test_what_cannot_be_walked_is_refused(original, samples, tmp_path, monkeypatch):
    """Here blocks hand something to the next one behind the decoder's back."""
    made, left = DiskModel._skeleton, []

    def leaking(self, kind, config):
        model = made(self, kind, config)
        for layer in model.get_decoder().layers:
            forward = layer.forward

            def wrapped(hidden, *args, _forward=forward, **kwargs):
                left.append(hidden.mean())
                return _forward(hidden, *args, **kwargs) + sum(left)

            layer.forward = wrapped
        return model

    monkeypatch.setattr(DiskModel, "_skeleton", leaking)
    with pytest.raises(ValueError, match="computes something else by itself"):
        calibrate_sequential(original, samples, output=tmp_path / "q", **FIXED)
    assert not (tmp_path / "q").exists()


class Once:
    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"samples": []}, ValueError, "samples is empty"),
        ({"samples": Once()}, TypeError, "an iterator ends after the first"),
        ({"samples": [[1]]}, TypeError, "sample 0 is a list"),
        ({"output": None}, ValueError, "name what to write"),
        ({"activations": "tape"}, ValueError, "unknown activations 'tape': choose one"),
        ({"model": "/no/such"}, FileNotFoundError, "there is no folder '/no/such'"),
        ({"output": "/no/such/q"}, FileNotFoundError, "there is no folder '/no/such'"),
        ({"include": "*.none"}, ValueError, "matches no linear"),
        ({"rank": -1}, ValueError, "rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_leave_nothing(original, samples, tmp_path, change, error, message):
    call = {"model": original, "samples": samples, "output": tmp_path / "q", **FIXED}
    with pytest.raises(error, match=message):
        calibrate_sequential(**{**call, **change})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["q", "q/recipe.safetensors"])
def test_a_recipe_where_the_checkpoint_goes_is_refused(
    original, samples, tmp_path, name
):
    """One would be written over the other."""
    with pytest.raises(ValueError, match="takes that place: give another name"):
        calibrate_sequential(
            original, samples, output=tmp_path / "q", recipe=tmp_path / name, **FIXED
        )
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_not_touched(original, samples, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        calibrate_sequential(original, samples, output=tmp_path / "q", **FIXED)
    assert [p.name for p in tmp_path.rglob("*")] == ["q", "precious.txt"]


def test_nan_in_the_data_is_refused_and_can_be_mended(original, samples, tmp_path):
    broken = [dict(samples[0]), *samples[1:]]
    broken[0]["pixel_values"] = samples[0]["pixel_values"] * float("nan")
    with pytest.raises(ValueError, match="nan or inf in vision tokens"):
        calibrate_sequential(original, broken, output=tmp_path / "q", **FIXED)
    # No block was finished, so that other samples are as good.
    assert calibrate_sequential(original, samples, output=tmp_path / "q", **FIXED)
