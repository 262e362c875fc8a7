# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``linear_sqnr`` against sums written out here."""

import copy
import math

import pytest
import torch
from hadamard_oracle import hadamard_f64
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config
from torchao_masquant.evaluation import SQNR, linear_sqnr

MODALITIES = ("text", "vision")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def _sample(tokens=12):
    ids = torch.arange(tokens)[None] % 2
    x = torch.randn(1, tokens, 16)
    x[ids == 1, 0] += 30
    return {"x": x, "modality_ids": ids}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def _quantized(model, method="masquant", scheme="w4a8"):
    recipe = calibrate(
        model,
        [_sample() for _ in range(8)],
        scheme=scheme,
        method=method,
        modalities=MODALITIES,
        progress=False,
    )
    quantized = copy.deepcopy(model)
    quantize_(quantized, masquant_config(recipe))
    return quantized


def _effective(weight, x, modality):
    """float64 output of a quantized weight for tokens of one modality, by formula."""
    pre_scale = weight.act_pre_scale[modality if weight.is_routed else 0].double()
    smoothed = (x.float() * pre_scale.float()).double()
    if weight.act_shift is not None:
        smoothed = smoothed - weight.act_shift[modality].double()
    smoothed = smoothed @ torch.from_numpy(
        hadamard_f64(x.shape[1], weight.hadamard_size)
    )
    quant_max = 2 ** (weight.act_bits - 1) - 1
    scale = smoothed.abs().amax(-1, keepdim=True) / quant_max
    x_hat = (smoothed / scale).round() * scale
    y = x_hat @ (weight.int_data().double() * weight.scale.double()).t()
    if modality and weight.l1 is not None:
        start = sum(weight.ranks[: modality - 1])
        columns = slice(start, start + weight.ranks[modality - 1])
        y = y + x_hat @ weight.l1[:, columns].double() @ weight.l2[columns].double()
    if weight.modality_bias is not None:
        y = y + weight.modality_bias[modality].double()
    return y


@pytest.mark.parametrize("method", ["masquant", "smoothquant"])
def test_equals_the_ratio_written_out(model, method):
    quantized = _quantized(model, method)
    samples = [_sample() for _ in range(3)]
    results = linear_sqnr(model, quantized, samples)
    assert list(results) == ["first", "second"]

    x = torch.cat([s["x"][0] for s in samples])
    ids = torch.cat([s["modality_ids"][0] for s in samples])
    inputs = {"first": x, "second": torch.tanh(model.first(x)).detach()}
    for name, inputs_of_linear in inputs.items():
        original, weight = (
            model.get_submodule(name),
            quantized.get_submodule(name).weight,
        )
        for index, modality in enumerate(MODALITIES):
            tokens = inputs_of_linear[ids == index]
            y = tokens.double() @ original.weight.detach().double().t()
            noise = (_effective(weight, tokens, index) - y).square().sum()
            if original.bias is not None:
                y = y + original.bias.detach().double()
            plain = 10 * math.log10(y.square().sum() / noise)
            centered = 10 * math.log10((y - y.mean(0)).square().sum() / noise)
            # The noise is a difference of float32 outputs: 1e-6 of the output, which is
            # 30 dB (a factor 1e3) below 1e-3 of the noise for these 4-bit weights.
            assert results[name][modality].plain == pytest.approx(plain, abs=0.02)
            assert results[name][modality].centered == pytest.approx(centered, abs=0.02)


def test_both_models_are_left_as_they_were(model):
    quantized = _quantized(model)
    linear_sqnr(model, quantized, [_sample()])
    assert "forward" not in model.__dict__
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_a_modality_without_tokens_is_left_out(model):
    quantized = _quantized(model)
    sample = _sample()
    sample["modality_ids"].zero_()
    results = linear_sqnr(model, quantized, [sample])
    assert list(results["first"]) == ["text"]


def test_models_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="Model has no quantized linear"):
        linear_sqnr(model, model, [_sample()])
    with pytest.raises(ValueError, match="original model has no first"):
        linear_sqnr(nn.Sequential(), _quantized(model), [_sample()])


def test_ratios_of_nothing_and_of_no_noise():
    silent = SQNR(count=2, total=torch.zeros(3))
    assert math.isnan(silent.plain)
    silent.noise = 1.0
    assert silent.plain == -math.inf
    exact = SQNR(count=1, total=torch.zeros(3), energy=1.0)
    assert exact.plain == math.inf
