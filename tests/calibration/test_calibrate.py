# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate``: what it finds, what it refuses, and that it leaves the model alone."""

import re

import pytest
import torch
from torch import nn

from torchao_masquant import calibrate

NAMES = ("text", "radar")


class Block(nn.Module):
    """Names that say nothing; ``pear``, ``fig`` and ``plum`` read one tensor."""

    def __init__(self):
        super().__init__()
        self.plum, self.fig, self.pear = (nn.Linear(8, 8) for _ in range(3))
        self.nut = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        y = torch.sigmoid(self.pear(x)) * self.fig(x) + self.plum(flat).view_as(x)
        return x + self.nut(torch.tanh(y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = nn.Linear(8, 8)
        self.fail = False

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if self.fail:
            raise RuntimeError("the model itself fails")
        return x


def _sample(seed=0, tokens=10):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 8, generator=generator)
    ids = (torch.arange(tokens) >= 6).long().expand(2, -1)
    x[ids == 1, 2] += 20
    return {"x": x, "modality_ids": ids}


SAMPLES = [_sample(seed) for seed in range(6)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().train()


def _calibrate(model, samples=SAMPLES, **options):
    options = {"modalities": NAMES, "exclude": "unused", "progress": False} | options
    return calibrate(model, samples, **options)


def _snapshot(model):
    return {
        name: (type(m), m.training, set(m.__dict__), [id(p) for p in m.parameters()])
        for name, m in model.named_modules()
    }


def test_linears_that_read_one_tensor_share_their_factor(model):
    layers = _calibrate(model).layers
    assert list(layers) == [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("plum", "fig", "pear", "nut")
    ]
    factor = {name: layer.smoothing_factor for name, layer in layers.items()}
    for i in range(2):
        assert torch.equal(factor[f"blocks.{i}.plum"], factor[f"blocks.{i}.fig"])
        assert torch.equal(factor[f"blocks.{i}.plum"], factor[f"blocks.{i}.pear"])
        assert not torch.equal(factor[f"blocks.{i}.plum"], factor[f"blocks.{i}.nut"])
    assert not torch.equal(factor["blocks.0.plum"], factor["blocks.1.plum"])


def _bad(**changes):
    return [SAMPLES[0], SAMPLES[1] | changes]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "w2a2"}, ValueError, "unknown scheme 'w2a2': choose one of w8a8"),
        ({"method": "awq"}, ValueError, "unknown method 'awq': choose one of masquant"),
        ({"samples": []}, ValueError, "samples is empty"),
        ({"samples": [SAMPLES[0], 3]}, TypeError, "sample 1 is a int, not a dict"),
        ({"base_modality": "sonar"}, ValueError, "base_modality 'sonar' is not one of"),
        ({"include": "*.pork"}, ValueError, "include pattern '*.pork' matches no"),
        ({"exclude": "lm_head"}, ValueError, "exclude pattern 'lm_head' matches no"),
        ({"exclude": "*"}, ValueError, "no linear is left to quantize"),
        ({"exclude": None}, ValueError, "unused was never called by the calibration"),
        (
            {"modalities": ("text", "radar", "sonar")},
            ValueError,
            "the calibration data brings no sonar token to blocks.0.pear, so sonar "
            "tokens would be uncalibrated",
        ),
        (
            {"samples": _bad(x=torch.full((2, 10, 8), torch.nan))},
            ValueError,
            "blocks.0.pear: its input holds nan or inf in text tokens",
        ),
        (
            {"samples": _bad(x=torch.zeros(2, 10, 8, device="meta"))},
            ValueError,
            "x of sample 1 is on meta, the model on cpu: move the sample there",
        ),
        (
            {"samples": _bad(x=torch.zeros(2, 10, 9))},
            (ValueError, RuntimeError),
            "shape",
        ),
        (
            {"samples": _bad(modality_ids=torch.ones(2, 11, dtype=torch.long))},
            ValueError,
            "blocks.0.pear: input of shape (2, 10, 8) does not match the modality ids of "
            "the call, of shape (2, 11)",
        ),
        (
            {"samples": _bad(modality_ids=torch.full((2, 10), 2))},
            ValueError,
            "they lie in 0..1, got 2..2",
        ),
        (
            {"samples": [{"x": SAMPLES[0]["x"]}]},
            RuntimeError,
            "blocks.0.pear: the modality of its tokens is not known",
        ),
    ],
)
def test_bad_input_gets_a_sentence_and_changes_nothing(model, options, error, message):
    before = _snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        _calibrate(model, **options)
    assert _snapshot(model) == before


def test_an_exception_of_the_model_leaves_it_as_it_was(model):
    model.fail = True
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match="the model itself fails"):
        _calibrate(model)
    assert _snapshot(model) == before


def test_an_input_of_the_wrong_width_names_the_linear():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x[..., :5])

    with pytest.raises(ValueError, match=r"inner: input of shape .* in_features=8"):
        calibrate(Broken(), [{"x": torch.randn(1, 2, 8)}], progress=False)


def test_text_alone_has_one_factor_and_no_pair():
    model = nn.Sequential(nn.Linear(4, 4))
    recipe = calibrate(model, [{"input": torch.randn(3, 4)}], progress=False)
    (layer,) = recipe.layers.values()
    assert recipe.modalities == ("text",)
    assert layer.smoothing_factor.shape == (1, 4) and layer.l1 is None
