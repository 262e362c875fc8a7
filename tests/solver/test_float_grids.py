# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Joint rounding, and the search for scales, on grids of floats."""

import number_oracle as oracle
import numpy as np
import pytest
import torch

from torchao_masquant.options import SCHEMES
from torchao_masquant.solver.shared_weight import (
    JointHessian,
    SharedWeight,
    round_to_nearest,
)

N, K = 10, 128
FLOATS = [name for name, scheme in SCHEMES.items() if scheme.weight_format]
every_scheme = pytest.mark.parametrize("name", FLOATS)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a covariance whose channels go together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    mixed = torch.randn(K, K // 4, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.eye(K, dtype=torch.float64)
    return weight, mixed @ mixed.t() / K + noise


def nearest(name: str, weight: torch.Tensor, importance: object = None) -> SharedWeight:
    return round_to_nearest(weight, torch.ones(K), SCHEMES[name], importance)


def loss(values: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = values - weight.double()
    return ((error @ hessian) * error).sum().item()


@every_scheme
def test_each_code_is_the_nearest_to_what_the_earlier_ones_leave(name: str) -> None:
    """GPTQ by the book, with the inverse of what is left found anew for every column."""
    weight, covariance = problem()
    start = nearest(name, weight)
    joint = JointHessian(covariance.clone(), torch.zeros((), dtype=torch.float64))
    found = joint.rounded(weight.double(), start, SCHEMES[name]).dequantize().numpy()
    by_code = oracle.FORMATS[SCHEMES[name].weight_format].values
    grid = np.array([v for v in by_code if not np.isnan(v)])
    hessian = covariance.numpy() + joint.ridge.item() * np.eye(K)
    steps = start.scale.double()
    if start.row_scale is not None:
        steps = steps * start.row_scale.double()[:, None]
    steps = steps.repeat_interleave(K // steps.shape[1], 1).numpy()
    left, wanted = joint.order.tolist()[::-1], weight.double().numpy().copy()
    while left:
        j = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        levels = wanted[:, j] / steps[:, j]
        least = np.abs(grid[None] - levels[:, None]).min(1)
        off = np.abs(found[:, j] / steps[:, j] - levels)
        assert (off <= least + 1e-3 * (1 + np.abs(levels))).all(), j
        error = (wanted[:, j] - found[:, j]) / inverse[0, 0]
        wanted[:, left] -= np.outer(error, inverse[0])
        left = left[1:]


@every_scheme
def test_joint_rounding_and_the_search_each_lower_the_loss(name: str) -> None:
    weight, covariance = problem()
    joint = JointHessian(covariance.clone(), torch.zeros((), dtype=torch.float64))
    plain = nearest(name, weight)
    searched = nearest(name, weight, joint.importance)
    rounded = joint.rounded(weight.double(), searched, SCHEMES[name])
    weighed = torch.diag(joint.importance)
    of_plain = loss(plain.dequantize(), weight, weighed)
    of_searched = loss(searched.dequantize(), weight, weighed)
    # Powers of two leave nothing to search for where no value is cut off.
    assert of_searched <= of_plain if name == "mxfp8" else of_searched < of_plain
    feedback = loss(rounded.dequantize(), weight, covariance)
    assert feedback < 0.9 * loss(searched.dequantize(), weight, covariance)


def test_four_over_six() -> None:
    """With a largest value of 4, its three quarters and halves are on the grid."""
    group = torch.tensor([4.0, 3.0, -2.0, 1.5, -4.0, 3.0, 1.0, 0.0] * 2)
    other = torch.tensor([6.0, 4.0, -3.0, 2.0, -6.0, 1.5, 0.5, 0.0] * 2)
    weight = torch.cat([group, other]).repeat(3, K // 32)
    found = nearest("nvfp4", weight, torch.ones(K, dtype=torch.float64))
    assert torch.allclose(found.dequantize().float(), weight, rtol=1e-6)
    off = nearest("nvfp4", weight).dequantize() - weight
    assert off[:, :16].abs().max() > 0.2 and off[:, 16:32].abs().max() < 1e-5


@every_scheme
def test_weights_rounded_together_come_apart_again(name: str) -> None:
    parts = [nearest(name, problem(seed)[0]) for seed in (0, 1)]
    for part, again in zip(parts, SharedWeight.cat(parts).split([N, N])):
        assert torch.equal(again.dequantize(), part.dequantize())
        assert (again.row_scale is None) == (part.row_scale is None)
        assert again.weight_format == part.weight_format == SCHEMES[name].weight_format


@every_scheme
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_of_any_size_are_rounded_alike(name: str, size: float) -> None:
    weight, covariance = problem()
    joint = JointHessian(covariance, torch.zeros((), dtype=torch.float64))

    def off(weight: torch.Tensor) -> float:
        start = nearest(name, weight, joint.importance)
        found = joint.rounded(weight.double(), start, SCHEMES[name]).dequantize()
        return ((found - weight).norm() / weight.double().norm()).item()

    sized = weight.clone()
    sized[: N // 2] *= size
    assert off(sized) < 1.3 * off(weight)
