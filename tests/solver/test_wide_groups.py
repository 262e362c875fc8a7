# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What keeps wide linears affordable: memory of statistics, products, sampled outputs."""

import dataclasses

import pytest
import torch
from group_oracle import data, statistics
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_masquant.options import SolverOptions
from torchao_masquant.solver import in_place, sampled_outputs
from torchao_masquant.solver import layers as layers_module
from torchao_masquant.solver.judge import mean_log_error
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.solver.modality_input import modality_inputs
from torchao_masquant.solver.sampled_outputs import sampled_rank
from torchao_masquant.solver.smoothing import WeightSizes


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        for field in dataclasses.fields(found[name]):
            one, other = (getattr(x[name], field.name) for x in (found, expected))
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), field.name
            else:
                assert one == other, field.name


@pytest.mark.parametrize(
    "scheme, method", [("w8a8", "masquant"), ("w4a4", "masquant-paper")]
)
def test_spent_statistics_give_the_same(scheme, method):
    tokens, weights = data()
    options = SolverOptions(scheme, method, rank=3)
    kept, spent = statistics(tokens), statistics(tokens)
    outers = [m.outer.clone() for m in kept.moments]
    expected = solve_group(weights, kept, options)
    _assert_same(solve_group(weights, spent, options, spend_statistics=True), expected)
    assert all(m.outer is None for m in spent.moments)
    assert all(torch.equal(m.outer, o) for m, o in zip(kept.moments, outers))


@pytest.mark.parametrize(
    "separation, scheme", [(0.0, "w4a8"), (1.0, "w4a4"), (0.0, "w4a16")]
)
def test_linears_are_rounded_below_each_other_or_apart(separation, scheme, monkeypatch):
    """As many at a time as are not all overhead: it changes no more than float32 does."""
    tokens, weights = data()
    size = 8 if scheme == "w4a16" else None
    options = SolverOptions(scheme, rank=2, separation=separation, group_size=size)
    together = solve_group(weights, statistics(tokens), options)
    monkeypatch.setattr(layers_module, "ROUNDED_TOGETHER", 1)
    apart = solve_group(weights, statistics(tokens), options)
    for name, layer in together.items():
        assert torch.equal(layer.scale, apart[name].scale)
        assert (layer.zero_point is None) == (scheme != "w4a16")
        assert (layer.qdata != apart[name].qdata).float().mean() < 0.02


@pytest.mark.parametrize(
    "values, expected",
    [
        ([], []),
        ([9], [[0]]),
        ([3, 5, 2, 1], [[0, 1], [2, 3]]),
        ([9, 1, 9, 4, 4], [[0], [1], [2], [3, 4]]),
    ],
)
def test_which_are_rounded_together(values, expected, monkeypatch):
    monkeypatch.setattr(layers_module, "ROUNDED_TOGETHER", 8)
    assert layers_module.rounded_together(values) == expected


class _LargeTensors(TorchDispatchMode):
    """Operators that make memory of so many bytes or more."""

    def __init__(self, least):
        super().__init__()
        self.least, self.made, self.known = least, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            mine = {
                a.untyped_storage().data_ptr()
                for a in (*args, *(kwargs or {}).values())
                if isinstance(a, torch.Tensor)
            }
            if storage.nbytes() >= self.least and storage.data_ptr() not in mine:
                self.made.append(str(function))
        return result


@pytest.mark.parametrize("separation", [0.0, 1.0])
def test_one_matrix_of_the_size_of_a_covariance(monkeypatch, separation):
    """The Hessian; all else is made in the memory of the statistics, or in parts."""
    monkeypatch.setattr(in_place, "ROWS", 16)
    monkeypatch.setattr(layers_module, "ROWS", 16)
    k = 256
    tokens, _ = data(k=k)
    weights = {"down": torch.randn(8, k, generator=torch.Generator().manual_seed(0))}
    found = statistics(tokens)
    with _LargeTensors(8 * k * k) as large:
        solve_group(
            weights,
            found,
            SolverOptions("w4a8", rank=2, alpha=0.5, separation=separation),
            spend_statistics=True,
        )
    assert large.made == ["aten.zeros_like.default"]


def test_choices_by_some_outputs(monkeypatch):
    """They are those that are best for evenly spaced rows, and serve all of them."""
    monkeypatch.setattr(sampled_outputs, "SAMPLED_OUTPUTS", 10)
    tokens, weights = data(seed=4)
    options = SolverOptions("w4a4", rank=0, alpha="auto", separation="auto")
    found = solve_group(weights, statistics(tokens), options)
    rows = {
        "q": [0, 3, 6, 9, 12, 15, 18, 21, 24, 27],
        "k": [0, 1, 2, 3, 4, 6, 7, 8, 9, 10],
    }
    some = {name: weight[rows[name]] for name, weight in weights.items()}

    def tried(alpha, separation):
        fixed = dataclasses.replace(options, alpha=alpha, separation=separation)
        return solve_group(weights, statistics(tokens), fixed)

    def error(alpha, separation):
        # Smoothing factors are made for the sizes of all rows.
        fixed = dataclasses.replace(options, alpha=alpha, separation=separation)
        problem = layers_module._Problem(
            some,
            {name: [0, 0] for name in some},
            WeightSizes.of(weights),
            modality_inputs(statistics(tokens), fixed),
            fixed,
        )
        layers = problem.solve(alpha, separation)
        return mean_log_error(some, layers, statistics(tokens), options)

    alphas = {a: error(a, 1.0) for a in options.alphas}
    alpha = min(alphas, key=alphas.get)
    both = {s: error(alpha, s) for s in options.separations}
    separation = min(both, key=both.get)
    _assert_same(found, tried(alpha, separation))
    assert len({round(e, 6) for e in [*alphas.values(), *both.values()]}) > 3


@pytest.mark.parametrize(
    "rank, whole, some, expected",
    [
        (0, (4096, 512), (1024, 512), 0),
        (26, (4096, 512), (1024, 512), 26),
        (179, (3584, 18944), (1024, 18944), 179),
        (1, (3584, 18944), (1024, 18944), 1),
        (358, (3584, 18944), (1024, 18944), 256),
        (1792, (3584, 18944), (1024, 18944), 512),
        (3584, (3584, 18944), (1024, 18944), 1024),
        (0, (0, 4), (0, 4), 0),
    ],
)
def test_ranks_of_some_outputs(rank, whole, some, expected):
    assert sampled_rank(rank, whole, some) == expected
