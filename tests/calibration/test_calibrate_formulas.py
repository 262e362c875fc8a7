# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate`` on real model classes against formulas on inputs seen by hooks.

The inputs of the linears are recorded by hooks of the tests' own, the modality of each
token is told from ``input_ids`` by a plain loop, and everything else is float64 linear
algebra on the recorded tokens: no covariances, no whitening.
"""

import copy

import numpy as np
import pytest
import tiny_models
import torch
from hadamard_oracle import hadamard_f64
from linear_oracle import ids_by_hand
from tiny_models import OMNI_DECODER
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config
from torchao_masquant.statistics import token_sample
from torchao_masquant.testing import digits

LAYER = f"{OMNI_DECODER}.layers.1."
PARTS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
}
FLOAT32 = 2.0**-24


def _tokens(model, samples, names, modalities, placeholders):
    """Name of each linear to its input tokens (T, K) per modality, padding left out."""
    seen = {name: [[] for _ in modalities] for name in names}
    ids = None

    def hook(name):
        def record(module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            for index, chunks in enumerate(seen[name]):
                chunks.append(x[ids.reshape(-1) == index].numpy())

        return record

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name))
        for name in names
    ]
    for sample in samples:
        ids = ids_by_hand(
            modalities,
            placeholders,
            sample["input_ids"],
            sample.get("attention_mask"),
            padding=-1,
        )
        with torch.no_grad():
            model(**sample)
    for handle in handles:
        handle.remove()
    return {n: [np.concatenate(c) for c in per] for n, per in seen.items()}


def _rounded(weight, base, bits):
    """What the integers of a quantized weight stand for; checked to be the nearest."""
    integers = weight.int_data().double().numpy()
    scale = weight.scale.double().numpy()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = np.abs(base).max(1, keepdims=True) / ((high - low) / 2)
    np.testing.assert_allclose(scale, step, rtol=8 * FLOAT32)
    assert integers.min() >= low and integers.max() <= high
    # Half a step; the largest value is half a step beyond the end. Float32 rounds a
    # value of up to 128 steps in the product, its reciprocal factor and the division.
    assert (np.abs(integers - base / step) <= 0.5 + 128 * 8 * FLOAT32).all()
    return integers * scale


#: Without what the published closed form has not, but the gauge and the bias.
PLAIN = dict(shift=False, rounding="nearest", clip=False, separation=1.0)


def _ordinary(x):
    """(T, K), those of tokens that are no sinks: not ten times as far as most."""
    middle = np.sort(x, axis=0)[(len(x) - 1) // 2]
    distance = ((x - middle) ** 2).sum(1)
    return x[distance <= 10 * np.quantile(distance, 0.9)]


def _made_of(tokens, weights, alpha, method):
    """Factors of each modality, and the rotation of what they smooth.

    Ours are made of root mean squares of ordinary tokens, for rotated channels; those
    that were published of the largest value of all tokens.
    """
    k = weights[0].shape[1]
    if method != "masquant":
        size = [np.abs(x).max(0) for x in tokens]
        largest = np.max([np.abs(w).max(0) for w in weights], 0)
        rotation = np.eye(k)
    else:
        size = [np.sqrt((_ordinary(x) ** 2).mean(0)) for x in tokens]
        largest = np.sqrt((np.concatenate(weights) ** 2).mean(0))
        rotation = hadamard_f64(k, min(k & -k, 512))
    return [
        np.maximum(s**alpha / np.maximum(largest, 1e-5) ** (1 - alpha), 1e-5)
        for s in size
    ], rotation


def _check_group(model, dense, recipe, names, tokens, method, bits, alpha, rank):
    weights = [dense.get_submodule(n).weight.data.double().numpy() for n in names]
    largest = np.max([np.abs(w).max(0) for w in weights], 0)
    factors, rotation = _made_of(tokens, weights, alpha, method)
    assert all((np.abs(x).max(0) > 0).all() for x in tokens)
    layers = [recipe.layers[n] for n in names]
    if not method.startswith("masquant"):
        loudest = np.max([np.abs(x).max(0) for x in tokens], 0)
        expected = loudest**alpha / np.maximum(largest, 1e-5) ** (1 - alpha)
        expected = (
            np.maximum(expected, 1e-5) if method == "smoothquant" else 1 + 0 * expected
        )
        for layer in layers:
            np.testing.assert_allclose(
                layer.smoothing_factor[0], expected, rtol=2 * FLOAT32
            )
        return

    if method == "masquant-paper" and names[0].endswith("down_proj"):
        # As its authors have it: only rounded.
        for layer in layers:
            assert (layer.smoothing_factor == 1).all() and layer.ranks == ()
            assert layer.smoothing_factor.shape[0] == 1
        return
    shared = [
        _rounded(model.get_submodule(n).weight.data, w * factors[0] @ rotation, bits)
        for n, w in zip(names, weights)
    ]
    for index, (x, factor) in enumerate(zip(tokens, factors)):
        if index and method == "masquant":
            centered = x - _ordinary(x).mean(0)
            dense_out = [centered @ w.T for w in weights]
            ours_out = [(centered / factor) @ rotation @ q.T for q in shared]
            sizes = [np.linalg.norm(y) for y in dense_out]
            g = np.linalg.lstsq(
                np.concatenate([y.ravel() / s for y, s in zip(ours_out, sizes)])[
                    :, None
                ],
                np.concatenate([y.ravel() / s for y, s in zip(dense_out, sizes)]),
                rcond=None,
            )[0][0]
            factor = factor / g
        for layer in layers:
            # One rounding to float32; g from a covariance of means up to 1e2 times the
            # variation: 1e4 * 2^-53 of cancellation, far below it.
            np.testing.assert_allclose(
                layer.smoothing_factor[index], factor, rtol=4 * FLOAT32
            )
        if index == 0:
            continue
        smoothed = x / factor @ rotation
        mean = _ordinary(x).mean(0) / factor @ rotation
        weighted = smoothed - mean if method == "masquant" else smoothed
        for layer, w, q in zip(layers, weights, shared):
            n, k = w.shape
            least = 32 if method == "masquant-paper" else 1
            r = min(n, k, max(least, round(rank * min(n, k))))
            start = sum(layer.ranks[: index - 1])
            assert layer.ranks[index - 1] == r
            l1 = layer.l1[:, start : start + r].double().numpy()
            l2 = layer.l2[start : start + r].double().numpy()
            difference = w * factor @ rotation - q
            target = weighted @ difference.T
            error = np.linalg.norm(target - weighted @ l1 @ l2)
            tail = np.linalg.norm(np.linalg.svd(target, compute_uv=False)[r:])
            # bfloat16 halves, 2^-9 each; directions below 1e-5 of the largest are left.
            rounding = np.linalg.norm(2.1 * 2**-9 * np.abs(weighted @ l1) @ np.abs(l2))
            rounding = max(
                rounding,
                np.linalg.norm(
                    2.1 * 2**-9 * np.abs(weighted) @ (np.abs(l1) @ np.abs(l2))
                ),
            )
            dropped = 1e-5 * np.linalg.norm(weighted, 2) * np.linalg.norm(difference)
            assert tail * (1 - 1e-9) <= error <= tail + rounding + dropped
            if method == "masquant-paper":
                assert layer.modality_bias is None
                continue
            # What is left of the mean of ordinary tokens is zero.
            left = mean @ (difference.T - l1 @ l2)
            size = np.abs(mean) @ (np.abs(difference.T) + np.abs(l1) @ np.abs(l2))
            bias = layer.modality_bias[index].double().numpy()
            assert (np.abs(bias - left) <= 4 * FLOAT32 * (size + np.abs(left))).all()


def _digits(dtype):
    placeholders = {
        digits.TOKEN_ID["<image>"]: "vision",
        digits.TOKEN_ID["<video>"]: "vision",
        digits.TOKEN_ID["<audio>"]: "audio",
    }
    return digits.load_model("outliers", dtype), placeholders


CASES = [
    ("masquant", "w4a8", torch.float32, None),
    ("masquant", "w4a8", torch.float32, ("text", "vision")),
    ("masquant", "w8a8", torch.bfloat16, None),
    ("masquant-paper", "w4a4", torch.bfloat16, None),
    ("masquant-paper", "w8a8", torch.float32, None),
    ("smoothquant", "w4a6", torch.float32, ("text", "vision")),
    ("rtn", "w8a8", torch.float32, None),
]


@pytest.mark.parametrize(("method", "scheme", "dtype", "modalities"), CASES)
def test_equals_the_formulas_on_the_digits_model(
    monkeypatch, method, scheme, dtype, modalities
):
    # Of all tokens, so that they are known here.
    monkeypatch.setattr(token_sample, "SAMPLE_TOKENS", 1 << 20)
    model, placeholders = _digits(dtype)
    samples = digits.calibration_samples(24)
    if modalities:
        samples = [s for s in samples if "input_features" not in s]
    cast = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()}
        for s in samples
    ]
    recipe = calibrate(
        model,
        cast,
        scheme=scheme,
        method=method,
        alpha=0.6,
        rank=0.05,
        **(PLAIN if method == "masquant" else {}),
        modalities=modalities,
        include=f"{LAYER}*",
        progress=False,
    )
    assert recipe.modalities == (modalities or ("text", "vision", "audio"))
    assert list(recipe.layers) == [
        n
        for n, m in model.named_modules()
        if n.startswith(LAYER) and type(m) is nn.Linear
    ]
    tokens = _tokens(model, cast, recipe.layers, recipe.modalities, placeholders)
    quantized = copy.deepcopy(model)
    quantize_(quantized, masquant_config(recipe))
    for part in PARTS:
        names = [LAYER + name for name in part]
        for other in names[1:]:
            for a, b in zip(tokens[names[0]], tokens[other]):
                np.testing.assert_array_equal(a, b)
        _check_group(
            quantized,
            model,
            recipe,
            names,
            tokens[names[0]],
            method,
            int(scheme[1]),
            0.6,
            0.05,
        )


def test_padded_batches_of_several_sequences():
    """Left padding, several sequences a call: the padding counts for nothing."""
    model = tiny_models.qwen25_vl()
    samples = [
        tiny_models.batch(
            [tiny_models.BOS, *tiny_models.words(9, s), "image", "video"],
            [tiny_models.BOS, "small image", *tiny_models.words(3, s + 50)],
            [*tiny_models.words(14, s + 70)],
            seed=s,
        )
        for s in range(5)
    ]
    assert any((s["attention_mask"] == 0).any() for s in samples)
    recipe = calibrate(model, samples, method="smoothquant", progress=False)
    mine = calibrate(model, samples, method="masquant-paper", rank=0, progress=False)
    tokens = _tokens(
        model, samples, recipe.layers, recipe.modalities, tiny_models.PLACEHOLDERS
    )
    for name, layer in mine.layers.items():
        group = [
            n for n in tokens if mine.layers[n].fingerprint and _same(tokens, n, name)
        ]
        largest = np.max(
            [
                model.get_submodule(n).weight.abs().amax(0).detach().numpy()
                for n in group
            ],
            0,
        ).astype(np.float64)
        if name.endswith("down_proj"):
            assert (layer.smoothing_factor == 1).all()
            continue
        for index, x in enumerate(tokens[name]):
            expected = np.sqrt(np.abs(x).max(0)) / np.sqrt(np.maximum(largest, 1e-5))
            np.testing.assert_allclose(
                layer.smoothing_factor[index], expected, rtol=2 * FLOAT32
            )


def _same(tokens, first, second):
    return all(
        a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(tokens[first], tokens[second])
    )


def test_groups_of_a_real_decoder():
    model = tiny_models.qwen25_vl()
    layers = tiny_models.recipe_of(model, method="masquant-paper", rank=0).layers
    for layer in (0, 1):
        factors = {
            name.split(f"layers.{layer}.")[1]: part.smoothing_factor
            for name, part in layers.items()
            if f"layers.{layer}." in name
        }
        found = {
            tuple(b for b in factors if _equal(factors[a], factors[b])) for a in factors
        }
        assert found == PARTS


def _equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)
