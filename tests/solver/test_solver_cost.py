# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operations and bytes that shapes tell, against those of a solution."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver import cost
from torchao_masquant.solver.cost import solver_bytes, solver_cost
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.sampled_outputs import SAMPLED_OUTPUTS
from torchao_masquant.statistics.input_statistics import SAMPLE_TOKENS, InputStatistics

FIXED = {"alpha": 0.5, "separation": 1.0}
AUTO = {"alpha": "auto", "separation": "auto"}


def problem(outputs, k, modalities):
    generator = torch.Generator().manual_seed(0)
    names = ("text", "vision", "audio")[:modalities]
    statistics = InputStatistics(k, names, torch.device("cpu"), True)
    for index in range(modalities):
        x = torch.randn(2 * k + SAMPLE_TOKENS, k, generator=generator)
        statistics.update("x", x, torch.full((len(x),), index))
    weights = {
        str(i): torch.randn(n, k, generator=generator) for i, n in enumerate(outputs)
    }
    return weights, statistics


class Counted(TorchDispatchMode):
    """Multiplications of matrices, those of float32 by halves, and J^3 of eigenvectors."""

    def __init__(self):
        super().__init__()
        self.macs = self.cubes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, first = func.overloadpacket.__name__, args[0] if args else None
        kinds = {torch.float64: 1.0, torch.float32: 0.5}
        if isinstance(first, torch.Tensor) and first.dtype in kinds:
            kind = kinds[first.dtype]
            if name in ("mm", "bmm"):
                self.macs += kind * first.numel() * args[1].shape[-1]
            elif name == "linalg_solve_triangular":
                self.macs += kind * first.shape[0] ** 2 * args[1].shape[1] / 2
            elif name in ("linalg_cholesky_ex", "linalg_cholesky"):
                self.macs += kind * first.shape[0] ** 3 / 3
            elif name == "addr_":
                self.macs += kind * first.numel()
            elif name == "_linalg_eigh":
                self.cubes += first.shape[0] ** 3
        return out


@pytest.mark.parametrize(
    "outputs, k, modalities, options",
    [
        ((96,), 192, 3, FIXED),
        ((320,), 128, 3, FIXED),
        ((128, 64), 128, 2, FIXED),
        ((96,), 192, 2, {**FIXED, "method": "masquant-paper"}),
        ((192,), 128, 2, {**FIXED, "rank": 0}),
        ((96,), 192, 3, {}),
        ((96, 32), 192, 2, {"scheme": "w4a4"}),
        ((96,), 192, 2, {**FIXED, "rounding": "nearest"}),
        ((96,), 128, 2, AUTO),
        ((SAMPLED_OUTPUTS + 512,), 128, 2, {**FIXED, "alpha": "auto"}),
    ],
)
def test_operations(outputs, k, modalities, options, monkeypatch):
    """Those of matrices, which are most of it where linears are wide."""
    options = SolverOptions(**options)
    weights, statistics = problem(outputs, k, modalities)
    with Counted() as counted:
        solve_group(weights, statistics, options)
    monkeypatch.setattr(cost, "_A_VALUE", 0)
    told = solver_cost([(n, k) for n in outputs], modalities, options)
    assert 0.5 < told / (counted.macs + cost._A_CUBE * counted.cubes) < 2


@pytest.mark.parametrize(
    "outputs, k, modalities, options",
    [
        ((256,), 512, 3, FIXED),
        ((768,), 256, 2, {}),
        ((256, 128), 256, 2, {"scheme": "w4a4", "rank": 0}),
        ((64,), 512, 2, {"rounding": "nearest"}),
        ((64,), 1024, 2, {}),
    ],
    ids=["own factors", "one factor", "noise", "nearest", "few outputs"],
)
def test_bytes(outputs, k, modalities, options):
    options = SolverOptions(**options)
    weights, statistics = problem(outputs, k, modalities)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        solve_group(weights, statistics, options, spend_statistics=True)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    beside = sum(outputs) * k
    counted = max(solver_bytes(n, k, beside, modalities, options) for n in outputs)
    # Vectors, samples and temporary values are left out.
    assert counted - cost._SCRATCH == pytest.approx(peak, rel=0.15)
