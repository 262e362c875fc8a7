# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration says of its data, once each, and of ordinary data nothing."""

import logging

import pytest
import tiny_models
import torch
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, calibrate

NAMES = ("text", "vision")


def data(samples=4, rows=2, length=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, rows, length)
    ids = torch.randint(0, 2, shape, generator=generator)
    x = torch.randn(*shape, 16, generator=generator)
    return [{"x": a, "modality_ids": i} for a, i in zip(x, ids)]


def run(samples, **options):
    options = {"rank": 2, "modalities": NAMES, "progress": False, **options}
    return calibrate(tiny_models.PlainModel(), samples, **options)


@pytest.fixture
def said(caplog):
    """Messages of calibration from a level on, without those of before."""
    caplog.set_level(logging.INFO, logger="torchao_masquant")

    def found(level=logging.WARNING):
        records = [r for r in caplog.records if r.name.startswith("torchao_masquant")]
        caplog.clear()
        return [r.getMessage() for r in records if r.levelno >= level]

    return found


@pytest.mark.parametrize("method", ["masquant", "smoothquant", "rtn"])
def test_of_ordinary_data_nothing(said, method):
    run(data(), method=method)
    assert said(logging.INFO) == []


def test_no_token_of_the_base_is_an_error():
    samples = [s | {"modality_ids": s["modality_ids"] * 0 + 1} for s in data()]
    with pytest.raises(ValueError, match="brings no text token to first, so text"):
        run(samples)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_handful_of_tokens_and_one_sequence_once_each(said, passes):
    bound = {} if passes == 1 else {"max_statistics_bytes": 1}
    run(data(samples=1, rows=1), **bound)
    few, other, one = said()
    assert "vision tokens: their ranges and covariances are guesses" in few + other
    assert one.startswith("the calibration data is a single sequence: ")
    # Several rows of one call, or calls of one row each, are several sequences.
    for samples in (data(samples=1, rows=3), data(samples=3, rows=1)):
        run(samples, **bound)
        assert said() == []


def in_memory(model, samples, folder):
    calibrate(model, samples, rank=2, progress=False)


def in_steps(model, samples, folder):
    chosen = {"method": "smoothquant", "scheme": "w8a8"}
    quantize_(model, MASQuantConfig(step="prepare", **chosen))
    for sample in samples:
        model(**sample)
    quantize_(model, MASQuantConfig(step="convert", **chosen))


def from_a_folder(model, samples, folder):
    from torchao_masquant.sequential import calibrate_sequential

    model.save_pretrained(folder / "model")
    out = folder / "recipe.safetensors"
    calibrate_sequential(folder / "model", samples, recipe=out, rank=2, progress=False)


@pytest.mark.parametrize("way", [in_memory, in_steps, from_a_folder])
def test_one_sequence_of_a_real_model_whatever_the_way(said, tmp_path, way):
    samples = tiny_models.samples(audio=False)
    for count in (4, 1):
        way(tiny_models.qwen25_vl(layers=2), samples[:count], tmp_path / str(count))
        told = [message for message in said() if "single sequence" in message]
        assert len(told) == (count == 1)


def test_sinks_are_told_and_nothing_is_wrong_with_them(said):
    samples = data()
    for sample in samples:
        sample["x"][:, 0] = 0
        sample["x"][:, 0, 5] = 500.0
        sample["modality_ids"][:, 0] = 1
    run(samples)
    assert said() == []
    run(samples)
    (told,) = said(logging.INFO)
    assert "of vision tokens are sinks at 1 of 2 inputs" in told
    assert "first 1" in told and "are made without them" in told


def loud(samples):
    """Text varies in one half of the channels alone, vision in the other."""
    half = torch.arange(16) % 2
    for sample in samples:
        sample["x"] *= 1e-3 + (half == sample["modality_ids"][..., None])
    return samples


def test_modalities_that_differ_by_much_where_that_can_be_used(said):
    run(loud(data()), scheme="w4a8", max_statistics_bytes=1)
    (told,) = said()
    assert told.startswith("Modalities differ by much at 1 of 2 inputs (up to")
    assert told.endswith("compare separation=1 with separation=0 on held-out data.")
    for options in (
        dict(scheme="w4a16", group_size=8),
        dict(scheme="w4a4", separation="auto"),
        dict(scheme="w4a4", separation=1.0),
        dict(scheme="w4a4", method="masquant-paper"),
        dict(scheme="w4a4", method="smoothquant"),
    ):
        run(loud(data()), **options)
        assert said() == [], options
