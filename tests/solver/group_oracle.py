# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Groups to solve for, and what their solutions do to tokens, in float64."""

import numpy as np
import torch
from hadamard_oracle import hadamard_f64

from torchao_masquant.statistics.input_statistics import InputStatistics

NAMES = ("text", "vision", "audio")
K, WIDTHS, TOKENS = 24, {"q": 30, "k": 12}, 160


def data(modalities=3, seed=0, tokens=TOKENS, k=K):
    """Tokens of modalities of other sizes, means and loud channels, and weights.

    Tokens lie on a grid of 2^-8, so that whole numbers can be added without rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(modalities):
        x = torch.randn(tokens, k, generator=generator)
        if index:
            x = x * 0.5 * index * torch.rand(k, generator=generator) * 3
            x[:, index] += 15 * index
            x[:, 5 + index] *= 12
            x = x @ torch.matrix_exp(0.2 * torch.randn(k, k, generator=generator))
        found.append((x * 256).round() / 256)
    weights = {
        name: 0.1 * torch.randn(n, k, generator=generator) for name, n in WIDTHS.items()
    }
    return found, weights


def statistics(tokens):
    k = tokens[0].shape[1]
    found = InputStatistics(k, NAMES[: len(tokens)], torch.device("cpu"), True)
    for index, x in enumerate(tokens):
        found.update("q", x, torch.full((len(x),), index))
    return found


def ordinary(x):
    """(T,) bool, which of sampled tokens are no sinks: not ten times as far as most."""
    middle = np.sort(x, axis=0)[(len(x) - 1) // 2]
    distance = ((x - middle) ** 2).sum(1)
    return distance <= 10 * np.quantile(distance, 0.9)


def center(x):
    """(K,) mean of the ordinary ones of tokens, of which there are no more than a sample."""
    x = x.double().numpy()
    return x[ordinary(x)].mean(0)


def grid_weight(layer, weight, bits):
    """(N, K) what the shared integers stand for: those of the solution."""
    assert layer.qdata is not None
    width = weight.shape[1] // layer.scale.shape[1]
    levels = layer.qdata.double().numpy()
    if layer.zero_point is not None:
        levels = levels - np.repeat(layer.zero_point.double().numpy(), width, 1)
    return levels * np.repeat(layer.scale.double().numpy(), width, 1)


def output(layer, weight, x, index, bits):
    """(T, N) of tokens of one modality: quantized, smoothed, shifted, compensated.

    Pairs and integers are those of rotated channels. Only where a value lies on a boundary between two integers does this read the
    formula's float32: the smoothed activations are the kernels' own.
    """
    matrix = grid_weight(layer, weight, bits)
    factor = layer.smoothing_factor[index]
    v = x.float() * factor.reciprocal()
    if layer.act_shift is not None:
        v = v - layer.act_shift[index]
    v = v.double().numpy() @ hadamard_f64(weight.shape[1], layer.hadamard_size)
    if bits.act_bits != 16:
        top = 2 ** (bits.act_bits - 1) - 1
        step = np.abs(v).max(1, keepdims=True) / top
        v = np.round(v / np.where(step > 0, step, 1)) * step
    y = v @ matrix.T
    if index and layer.l1 is not None:
        start = sum(layer.ranks[: index - 1])
        own = slice(start, start + layer.ranks[index - 1])
        y = y + v @ layer.l1[:, own].double().numpy() @ layer.l2[own].double().numpy()
    if layer.modality_bias is not None:
        y = y + layer.modality_bias[index].double().numpy()
    return y


def log_errors(layers, weights, tokens, bits):
    """Name and modality to ``log`` of the error over what varies in the output."""
    found = {}
    for name, weight in weights.items():
        for index, x in enumerate(tokens):
            exact = x.double().numpy() @ weight.double().numpy().T
            error = output(layers[name], weight, x, index, bits) - exact
            energy = ((exact - exact.mean(0)) ** 2).sum()
            found[name, index] = np.log((error**2).sum() / energy)
    return found
