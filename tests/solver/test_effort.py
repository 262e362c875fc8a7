# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A fast solution: float32 decompositions cost nothing that float64 would have saved."""

import pytest
import torch
from group_oracle import log_errors, statistics

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver.layers import solve_group

N, K = 24, 96


def tokens(sink):
    """Two modalities of few directions: most of the covariance is near to singular."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for scale in (1.0, 8.0):
        basis = torch.randn(12, K, generator=generator)
        x = torch.randn(200, 12, generator=generator) @ basis * scale
        found.append(x + 1e-3 * torch.randn(200, K, generator=generator))
    found[0][7, 5] = sink
    return found


@pytest.mark.parametrize("sink", [0.0, 1e5], ids=["ordinary", "a sink"])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_integers_are_as_good(scheme, sink):
    given = tokens(sink)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    errors = {}
    for effort in ("full", "fast"):
        options = SolverOptions(scheme, rank=0, effort=effort)
        layers = solve_group({"q": weight}, statistics(given), options)
        found = log_errors(layers, {"q": weight}, given, options.number_format)
        errors[effort] = list(found.values())
    assert errors["fast"] == pytest.approx(errors["full"], abs=0.02)


def test_pairs_that_are_asked_for_are_found():
    given = tokens(0.0)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    options = SolverOptions("w4a8", rank=4, effort="fast")
    layer = solve_group({"q": weight}, statistics(given), options)["q"]
    assert layer.ranks == (4,) and torch.isfinite(layer.l1).all()
