# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Killed at any moment, a calibration goes on, and ends as if nothing had been."""

import os
import random
import shutil
import signal

import killed_runs
import pytest
import tiny_models
from results import FIXED, assert_same_files

from torchao_masquant.sequential import calibrate_sequential

LAYERS = 3
#: Of the file operations of a whole run; a few more or fewer do no harm.
STEPS = 62


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_models.qwen25_vl(LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = killed_runs.context().Process(
        target=killed_runs.calibrate, args=(original, folder), kwargs=FIXED
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_file_operation(original, uninterrupted, tmp_path, seed):
    """Again and again, each time a little further, until nothing is left to kill."""
    context, kills = killed_runs.context(), 0
    generator = random.Random(seed)
    while True:
        die_at = generator.randrange(STEPS // 2) if kills < 4 else None
        process = context.Process(
            target=killed_runs.calibrate,
            args=(original, tmp_path, die_at),
            kwargs=FIXED,
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills
    assert_same_files(uninterrupted, tmp_path)


@pytest.fixture
def interrupted(original, tmp_path, monkeypatch):
    """A folder in which the second of three blocks was being written."""
    killed_runs.stop_at(monkeypatch, 1)
    with pytest.raises(killed_runs.Stop):
        run(original, tmp_path)
    monkeypatch.undo()
    found = {
        path.name for path in (tmp_path / "quantized.partial").glob("block-*.json")
    }
    assert found == {"block-00000.json"}
    return tmp_path


def run(original, folder, **options):
    data = options.pop("samples", tiny_models.samples(audio=False))
    return calibrate_sequential(
        original,
        data,
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **{**FIXED, **options},
    )


def test_finished_blocks_are_not_solved_again(original, interrupted, uninterrupted):
    before = os.stat(interrupted / "quantized.partial" / "block-00000.json")
    assert len(list(interrupted.iterdir())) == 1
    done = run(original, interrupted)
    assert (done.resumed, len(done.seconds)) == (1, LAYERS - 1)
    assert before.st_ino
    assert_same_files(uninterrupted, interrupted)


def test_a_finished_calibration_is_not_repeated(original, interrupted):
    run(original, interrupted)
    times = {p: p.stat().st_mtime_ns for p in interrupted.rglob("*")}
    assert run(original, interrupted).seconds == ()
    assert times == {p: p.stat().st_mtime_ns for p in interrupted.rglob("*")}
    with pytest.raises(ValueError, match="is there already, and not a result of this"):
        run(original, interrupted, rank=3)


def test_another_option_is_refused(original, interrupted):
    folder = interrupted / "quantized.partial"
    before = sorted(p.name for p in folder.iterdir())
    fewer = tiny_models.samples(audio=False, count=5)
    for change, message in (
        ({"rank": 3}, r"another option rank \(2, now 3\)"),
        ({"scheme": "w8a8"}, r"another option scheme \(w4a8, now w8a8\)"),
        ({"exclude": "*.q_proj"}, "another choice of linears"),
        ({"head_bits": 8}, r"another option head_bits \(not given, now 8\)"),
        ({"base_modality": "vision"}, "another choice of modalities"),
        ({"samples": fewer}, "set of samples"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            run(original, interrupted, **change)
        assert "or remove that folder to begin again" in str(raised.value)
        assert sorted(p.name for p in folder.iterdir()) == before


def test_another_model_is_refused(interrupted, original, tmp_path_factory):
    """One of the same shape, in the same place."""
    other = tmp_path_factory.mktemp("other") / "model"
    tiny_models.qwen25_vl(LAYERS, seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="begun with another model: go on with"):
        run(other, interrupted)


def test_copies_of_model_and_samples_are_the_same(
    interrupted, original, tmp_path_factory
):
    """And modalities in another order are the same choice."""
    copy = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(original, copy)
    samples = [
        {name: value.clone() for name, value in sample.items()}
        for sample in tiny_models.samples(audio=False)
    ]
    modalities = ("vision", "text")
    assert run(copy, interrupted, samples=samples, modalities=modalities).resumed == 1


def test_other_memory_is_no_other_option(interrupted, original, uninterrupted):
    """What does not change the result may change on the way."""
    assert run(
        original, interrupted, max_statistics_bytes=200_000, activations="disk"
    ).resumed
    assert_same_files(uninterrupted, interrupted)


def test_learning_goes_on(original, tmp_path, monkeypatch):
    """The quantized stream is that of the finished blocks."""
    options = {"epochs": 1, "lr": 3e-3}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir(), halves.mkdir()
    run(original, whole, **options)
    killed_runs.stop_at(monkeypatch, 2)
    with pytest.raises(killed_runs.Stop):
        run(original, halves, **options)
    monkeypatch.undo()
    assert run(original, halves, **options).resumed == 2
    assert_same_files(whole, halves)
