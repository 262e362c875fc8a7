# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One linear and its part of a recipe, and its placeholder, under every scheme."""

import copy
import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from linear_oracle import expected
from torch import nn

from torchao_masquant import MASQuantLinear, Router, token_modalities
from torchao_masquant.conversion.fitting import quantized_weight
from torchao_masquant.conversion.placeholders import placeholder_weight
from torchao_masquant.conversion.quantized_modules import replace_weights
from torchao_masquant.options import SCHEMES, Scheme, SolverOptions, get_scheme
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.tensor_subclasses import (
    quantize_smoothed_weight,
)

MODALITIES = ("text", "vision", "audio")

ALL = {
    **{name: scheme for name, scheme in SCHEMES.items() if not scheme.floats},
    # Weights per group of any other scheme.
    "w4a8 in groups": dataclasses.replace(get_scheme("w4a8"), group_size=64),
}
every_scheme = pytest.mark.parametrize("name", ALL)


def options(scheme: Scheme, **given: Any) -> SolverOptions:
    return SolverOptions(scheme=scheme.name, group_size=scheme.group_size, **given)


def problem(
    scheme: Scheme,
    shape: tuple[int, int] = (24, 256),
    ranks: tuple[int, int] = (2, 3),
) -> tuple[nn.Linear, LayerRecipe]:
    torch.manual_seed(0)
    n, k = shape
    linear = nn.Linear(k, n).requires_grad_(False)
    return linear, LayerRecipe(
        shape=shape,
        fingerprint=weight_fingerprint(linear.weight),
        smoothing_factor=torch.rand(3, k) + 0.5,
        ranks=ranks,
        l1=torch.randn(k, sum(ranks)) / 16,
        l2=torch.randn(sum(ranks), n) / 16,
        modality_bias=torch.randn(3, n) / 16,
    )


def quantized(
    scheme: Scheme, linear: nn.Linear, layer: LayerRecipe, low_rank_bits: int = 16
) -> MASQuantLinear:
    given = options(scheme, low_rank_bits=low_rank_bits)
    weight = quantized_weight("layer.q", linear.weight, layer, given, MODALITIES)
    layers = {"layer.q": copy.deepcopy(linear)}
    made = replace_weights(layers, {"layer.q": weight}, Router(MODALITIES))
    assert isinstance(made, MASQuantLinear)
    return made


@pytest.mark.parametrize("low_rank_bits", [16, 8])
@every_scheme
def test_against_float64(name: str, low_rank_bits: int) -> None:
    scheme = ALL[name]
    module = quantized(scheme, *problem(scheme), low_rank_bits)
    weight = module.weight.data
    assert (weight.weight_bits, weight.act_bits) == (
        scheme.weight_bits,
        scheme.act_bits,
    )
    assert weight.group_size == (scheme.group_size or 256)
    assert weight.symmetric == scheme.symmetric
    assert weight.weight_only == scheme.weight_only
    assert weight.low_rank_bits == low_rank_bits
    x = torch.randn(2, 5, 256)
    ids = torch.arange(10).reshape(2, 5) % 3
    with torch.no_grad():
        with token_modalities(module, ids):
            y = module(x)
        with token_modalities(module, None):
            base = module(x)
    for actual, meant in ((y, ids), (base, torch.zeros_like(ids))):
        reference, bound = expected(module, x.reshape(10, 256), meant.reshape(10))
        assert ((actual.reshape(10, -1) - reference).abs() <= bound).all()


@every_scheme
def test_error_is_that_of_the_bits(name: str) -> None:
    """Of text tokens, which no pair repairs: the scheme's bits, nothing else."""
    scheme = ALL[name]
    linear, layer = problem(scheme)
    module = quantized(scheme, linear, layer)
    error = (module.weight.data.dequantize() - linear.weight).abs().double().numpy()
    width = scheme.group_size or 256
    smoothed = (linear.weight * layer.smoothing_factor[0]).double().numpy()
    blocks = smoothed.reshape(24, -1, width)
    levels = 2**scheme.weight_bits - 1
    if scheme.symmetric:
        step = 2 * np.abs(blocks).max(-1) / levels
    else:
        step = (blocks.max(-1).clip(min=0) - blocks.min(-1).clip(max=0)) / levels
    error = error * layer.smoothing_factor[0].numpy()
    # Half a step, and float32's roundings of scales and products.
    assert (error <= 0.5 * np.repeat(step, width, 1) * (1 + 1e-4)).all()
    assert error.max() > 0.4 * step.min()


@every_scheme
def test_ready_integers_take_the_place_of_rounding(name: str) -> None:
    scheme = ALL[name]
    linear, layer = problem(scheme)
    qdata, scale, zero_point = quantize_smoothed_weight(
        linear.weight,
        layer.smoothing_factor[0].reciprocal(),
        scheme.weight_bits,
        scheme.group_size,
        symmetric=scheme.symmetric,
    )
    ready = dataclasses.replace(layer, qdata=qdata, scale=scale, zero_point=zero_point)
    rounded = quantized(scheme, linear, layer).weight.data
    same = quantized(scheme, linear, ready).weight.data
    assert torch.equal(same.qdata, rounded.qdata)
    assert torch.equal(same.dequantize(), rounded.dequantize())
    # Other integers, as error feedback would choose them.
    moved = qdata + (qdata < 0).to(torch.int8)
    other = quantized(
        scheme,
        linear,
        dataclasses.replace(ready, qdata=moved),
    ).weight.data
    assert torch.equal(other.int_data(), moved)
    assert other.dtype == linear.weight.dtype


def test_integers_without_a_scale() -> None:
    scheme = get_scheme("w4a8")
    linear, layer = problem(scheme)
    layer.qdata = torch.zeros(24, 256, dtype=torch.int8)
    with pytest.raises(ValueError) as raised:
        quantized(scheme, linear, layer)
    assert str(raised.value) == "layer.q: its recipe has integers without a scale."


@pytest.mark.parametrize("shape", [(24, 192), (24, 100), (6, 127)], ids=str)
def test_a_width_that_groups_do_not_divide(shape: tuple[int, int]) -> None:
    message = (
        "group_size must be at least 2 and divide the input width, got "
        f"group_size=128 for a weight of shape {shape}."
    )
    scheme = get_scheme("w4a16")
    linear, layer = problem(scheme, shape)
    with pytest.raises(ValueError, match=f"^{re.escape('layer.q: ' + message)}$"):
        quantized(scheme, linear, layer)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        placeholder_weight("layer.q", linear.weight, options(scheme), MODALITIES)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_scheme
def test_placeholder_has_the_layout_of_a_weight_with_the_methods_parts(
    name: str, device: str
) -> None:
    scheme = ALL[name]
    linear, layer = problem(scheme, ranks=(3, 3))
    layer.hadamard_size = 256
    if not scheme.weight_only:
        layer.act_shift = torch.randn(3, 256)
    weight = quantized(scheme, linear, layer, low_rank_bits=8).weight.data
    placeholder = placeholder_weight(
        "layer.q",
        linear.to(device).weight,
        options(scheme, rank=3, low_rank_bits=8),
        MODALITIES,
    )
    names, attributes = weight.__tensor_flatten__()
    assert placeholder.__tensor_flatten__() == (names, attributes)
    for part in names:
        ours, theirs = getattr(placeholder, part), getattr(weight, part)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), part
        assert ours.device.type == device
    if device == "cpu":
        assert (placeholder.dequantize() == 0).all()
        placeholder.copy_(weight)
        assert torch.equal(placeholder.dequantize(), weight.dequantize())


def test_schemes() -> None:
    assert {
        s.name: (s.weight_bits, s.act_bits, s.group_size, s.symmetric, s.weight_only)
        for s in SCHEMES.values()
        if not s.floats
    } == {
        "w8a8": (8, 8, None, True, False),
        "w4a8": (4, 8, None, True, False),
        "w4a6": (4, 6, None, True, False),
        "w4a4": (4, 4, None, True, False),
        "w3a3": (3, 3, None, True, False),
        "w4a16": (4, 16, 128, False, True),
    }
    assert {
        s.name: (s.weight_bits, s.act_bits, s.group_size, s.weight_format, s.act_format)
        for s in SCHEMES.values()
        if s.floats
    } == {
        "fp8": (8, 8, None, "e4m3", "e4m3"),
        "fp8-block": (8, 8, 128, "e4m3-128", "e4m3-128"),
        "w4a8-fp8": (4, 8, None, None, "e4m3"),
        "nvfp4": (4, 4, 16, "nvfp4", "nvfp4"),
        "mxfp4": (4, 4, 32, "mxfp4", "mxfp4"),
        "mxfp8": (8, 8, 32, "mxfp8", "mxfp8"),
    }
    assert all(get_scheme(name) is scheme for name, scheme in SCHEMES.items())
    with pytest.raises(
        ValueError, match="unknown scheme 'w2a16': choose one of w8a8, "
    ):
        get_scheme("w2a16")


def test_three_bits_save_nothing_over_four() -> None:
    """Simulated: what the class says of them."""
    sizes = {
        name: quantized(get_scheme(name), *problem(get_scheme(name))).weight.data
        for name in ("w3a3", "w4a4")
    }
    assert sizes["w3a3"].nbytes_stored == sizes["w4a4"].nbytes_stored
    assert sizes["w3a3"].int_data().min() == -4 and sizes["w3a3"].int_data().max() == 3
