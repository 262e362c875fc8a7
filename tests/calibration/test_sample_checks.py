# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Samples as people hand them over by mistake: one clear sentence, from everywhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from torchao_masquant import analyze, calibrate, evaluate, modality_sensitivity
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.testing import digits


@pytest.fixture(scope="module")
def model():
    return digits.load_model("plain")


def good():
    return digits.calibration_samples(1)[0]


def with_(**changed):
    return [{**good(), **changed}]


def from_disk(model, samples):
    calibrate_sequential(digits.checkpoint_path("plain"), samples, recipe="never")


ENTRANCES = [calibrate, analyze, modality_sensitivity, evaluate, from_disk]

WRONG = [
    (lambda: good(), "one dict .*, not a list of samples: put it in a list"),
    (lambda: torch.zeros(1, 4), "is a Tensor, not a list"),
    (lambda: 7, "is a int, not a list"),
    (lambda: [good()["input_ids"]], "is a Tensor, not a dict"),
    (lambda: ["What is it?"], "is a str, not a dict"),
    (
        lambda: with_(input_ids=good()["input_ids"].tolist()),
        "list, not a tensor: .*'pt'",
    ),
    (lambda: with_(attention_mask=[[1, 1]]), "attention_mask of sample.* list"),
    (lambda: with_(input_ids=good()["input_ids"].numpy()), "ndarray, not a tensor"),
    (lambda: with_(input_ids=good()["input_ids"][0]), r"not \(batch, sequence\): add"),
    (lambda: with_(input_ids=good()["input_ids"][None]), "default collate_fn stacks"),
    (lambda: with_(input_ids=good()["input_ids"].float()), "float32, and ids are int"),
    (lambda: [{"image": Image.new("RGB", (2, 2)), "prompt": "?"}], "an image.* row of"),
    (lambda: [{"prompt": ["one", "two"]}], "a list with text under 'prompt'"),
    (lambda: [{"audio": np.zeros(8), "sampling_rate": 16000}], "a numpy array"),
]


def as_given(entrance, samples):
    """Evaluation wants labels beside the inputs."""
    if entrance is evaluate and isinstance(samples, list):
        return [
            {"labels": torch.zeros(1, 4, dtype=torch.int64), **s}
            if isinstance(s, dict)
            else s
            for s in samples
        ]
    return samples


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("samples, message", WRONG, ids=lambda v: str(v)[:20])
def test_wrong_samples(model, monkeypatch, tmp_path, entrance, samples, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        entrance(model, as_given(entrance, samples()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entrance", ENTRANCES[:-1], ids=lambda f: f.__name__)
def test_a_generator_that_has_ended(model, entrance):
    with pytest.raises(ValueError, match="is empty: .*; an iterator ends after"):
        entrance(model, iter(()))
    with pytest.raises(ValueError, match="is empty: "):
        entrance(model, [])


def test_what_models_take_stays():
    """An additive mask, and lists of tensors."""
    from torchao_masquant.sample_checks import check_sample

    check_sample({"attention_mask": torch.zeros(1, 1, 4, 4)}, "sample 0")
    check_sample(
        {"pixel_values": [torch.zeros(3, 2, 2)], "sizes": [(2, 2)]}, "sample 0"
    )
    check_sample({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 4)}, "sample 0")
