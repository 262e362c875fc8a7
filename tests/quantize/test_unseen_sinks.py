# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A sink that calibration never saw: no other token notices it, and it is as exact itself.

Each token has a scale of its own, found when it comes, so that nothing that calibration
knows of ranges can be exceeded.
"""

import pytest
import torch

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics

NAMES = ("text", "vision", "audio")
OUT, WIDTH = 32, 192  # rotated in blocks of 64
LOUDER = 1000.0


def problem(scheme):
    """A weight, the same quantized, ordinary tokens (T, K) and their modalities (T,)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    x = torch.randn(600, WIDTH, generator=generator)
    ids = torch.arange(600) % 3
    # Constants to shift, other ones in each modality.
    x += (
        20
        * torch.randn(3, WIDTH, generator=generator).mul_(
            torch.rand(WIDTH, generator=generator) < 0.05
        )[ids]
    )
    statistics = InputStatistics(WIDTH, NAMES, torch.device("cpu"), True)
    statistics.update("linear", x, ids)
    options = SolverOptions(scheme, rank=4)
    assert options.hadamard_size_of(WIDTH) == 64
    (layer,) = solve_group({"linear": weight}, statistics, options).values()
    quantized = layer.quantize(
        weight, options.number_format, NAMES, options.low_rank_bits
    )
    return weight, quantized, x, ids


def run(x, quantized, ids):
    return torch.ops.masquant.linear(x, quantized, ids, None)


# Of the token's output: what rounding at most to half a step of 1/127, 1/31 and 1/7 of a
# token's largest value adds to what the weight's own bits leave.
@pytest.mark.parametrize(
    "scheme, within", [("w8a8", 0.02), ("w4a8", 0.15), ("w4a6", 0.17), ("w4a4", 0.2)]
)
@pytest.mark.parametrize("modality", range(3))
@pytest.mark.parametrize(
    "kind", ["one channel", "all channels", "a known token, louder"]
)
def test_a_sink_in_a_modality_that_had_none(scheme, within, modality, kind):
    weight, quantized, x, ids = problem(scheme)
    place = 297 + modality
    assert ids[place] == modality
    louder = x.clone()
    if kind == "one channel":
        louder[place, 7] = LOUDER * x.abs().max()
    elif kind == "all channels":
        generator = torch.Generator().manual_seed(1)
        louder[place] = LOUDER * x.abs().max() * torch.randn(WIDTH, generator=generator)
    else:
        louder[place] *= LOUDER
    before, after = run(x, quantized, ids), run(louder, quantized, ids)
    others = torch.arange(len(x)) != place
    assert torch.equal(before[others], after[others])
    exact = louder[place].double() @ weight.double().t()
    error = (after[place].double() - exact).norm() / exact.norm()
    assert error < within
