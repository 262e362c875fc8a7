# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is taken off the activations, and how it comes back in the bias."""

import pytest
import torch

from torchao_masquant.options import SolverOptions, get_scheme
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics

K, N, TOKENS = 24, 16, 300
NAMES = ("text", "vision", "audio")


def _problem(modalities=3, constants=30.0, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    statistics = InputStatistics(K, NAMES[:modalities], torch.device("cpu"), True)
    data = []
    for index in range(modalities):
        x = torch.randn(tokens, K, generator=generator)
        # Channels of a large constant, others for each modality.
        x[:, 3 * index : 3 * index + 2] += constants
        data.append(x)
        statistics.update("q", x, torch.full((tokens,), index))
    return data, {"q": torch.randn(N, K, generator=generator) / 5}, statistics


def _output(layer, weight, options, x, index, modalities):
    quantized = layer.quantize(weight, options.number_format, NAMES[:modalities])
    ids = torch.full((len(x),), index)
    return torch.ops.masquant.linear(x, quantized, ids, None)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_constants_cost_nothing(scheme):
    """With the shift, outliers of 200 leave the error that there is without them."""

    def error(constants, shift):
        data, weights, statistics = _problem(constants=constants)
        options = SolverOptions(scheme, rank=2, shift=shift, alpha=0.5, separation=1.0)
        layer = solve_group(weights, statistics, options)["q"]
        total = 0.0
        for index, x in enumerate(data):
            y = _output(layer, weights["q"], options, x, index, 3).double()
            total += (y - x.double() @ weights["q"].double().t()).square().sum().item()
        return total

    without = error(0.0, True)
    assert error(200.0, True) < 1.5 * without
    assert error(200.0, False) > 10 * without


def test_what_is_left_of_a_constant_is_no_signal():
    """A channel that varies by float32's rounding is not smoothed as if it mattered."""
    _, weights, _ = _problem()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, K, generator=generator)
    x[:, 7] = 1000 * (1 + 1e-7 * torch.randn(TOKENS, generator=generator))
    statistics = InputStatistics(K, NAMES[:1], torch.device("cpu"), True)
    statistics.update("q", x, None)
    options = SolverOptions("w8a8", alpha=0.5)
    layer = solve_group(weights, statistics, options)["q"]
    # 1000 / 256 is the least range that it is given.
    factor = layer.smoothing_factor[0]
    assert factor[7] > 0.5 * factor.median()
    # Such a channel off by what bfloat16 makes of it harms its token no more than that.
    y = _output(layer, weights["q"], options, x, 0, 1).double()
    error = (y - x.double() @ weights["q"].double().t()).square().mean()
    assert error < 1e-3 * (x.double() @ weights["q"].double().t()).var(0).mean()


def test_without_rounded_activations_there_is_no_shift():
    _, weights, statistics = _problem()
    options = SolverOptions("w4a16", group_size=8)
    layer = solve_group(weights, statistics, options)["q"]
    assert layer.act_shift is None and layer.modality_bias is not None
    # And no reason for factors of their own, but for the gauge.
    ratio = layer.smoothing_factor / layer.smoothing_factor[0]
    torch.testing.assert_close(ratio, ratio[:, :1].expand(3, K))
    assert get_scheme("w4a16").weight_only
