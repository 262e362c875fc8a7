# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Method "masquant-paper": ranks, ``down_proj`` and learned factors as its authors have them."""

import pytest
import torch
from torch import nn

from torchao_masquant import calibrate
from torchao_masquant.learning.published import PublishedTask, _rounded_weight
from torchao_masquant.options import SCHEMES, SolverOptions
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import (
    dequantize_smoothed_weight,
    quantize_smoothed_weight,
)

NAMES = ("text", "vision")
PAPER = "masquant-paper"


@pytest.mark.parametrize(
    "method, rank, n, k, expected",
    [
        (PAPER, 0.05, 256, 256, 32),
        (PAPER, 0.05, 2048, 11008, 102),
        (PAPER, 0.05, 16, 256, 16),
        (PAPER, 0.0, 256, 256, 0),
        (PAPER, 3, 256, 256, 3),
        ("masquant", 0.05, 256, 256, 13),
    ],
)
def test_rank(method, rank, n, k, expected):
    assert SolverOptions(method=method).rank_of(rank, n, k) == expected


@pytest.mark.parametrize(
    "name, spared",
    [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.experts.down_proj[7]", True),
        ("decoder.layers.3.fc2", True),
        ("model.layers.0.mlp.up_proj", False),
        ("down_proj.q_proj", False),
    ],
)
def test_which_linears_are_spared(name, spared):
    assert SolverOptions(method=PAPER).spares(name) == spared
    assert not SolverOptions().spares(name)


def test_a_spared_linear_is_rounded_as_it_is():
    generator = torch.Generator().manual_seed(0)
    statistics = InputStatistics(48, NAMES, torch.device("cpu"), True)
    for index in range(2):
        x = torch.randn(96, 48, generator=generator) * (1 + 9 * index)
        statistics.update("x", x, torch.full((96,), index))
    weights = {
        name: torch.randn(40, 48, generator=generator)
        for name in ("mlp.down_proj", "mlp.up_proj")
    }
    found = solve_group(weights, statistics, SolverOptions(method=PAPER))
    assert list(found) == list(weights)
    spared, other = found.values()
    assert torch.equal(spared.smoothing_factor, torch.ones(1, 48))
    assert spared.ranks == () and spared.l1 is None
    assert other.ranks == (32,) and other.smoothing_factor.shape == (2, 48)
    plain = solve_group(weights, statistics, SolverOptions(method="rtn"))
    bits = SCHEMES["w4a8"]
    weight = weights["mlp.down_proj"]
    ours, theirs = (
        layers["mlp.down_proj"].quantize(weight, bits, NAMES).dequantize()
        for layers in (found, plain)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_learning_rounds_weights_as_converting_does(scheme):
    bits = SCHEMES[scheme]
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    factor = torch.rand(256) + 0.5
    qdata, scale, zero = quantize_smoothed_weight(
        weight,
        factor.reciprocal(),
        bits.weight_bits,
        bits.group_size,
        symmetric=bits.symmetric,
    )
    held = dequantize_smoothed_weight(qdata, scale, zero_point=zero)
    found = _rounded_weight(weight / factor.reciprocal(), bits)
    step = scale.repeat_interleave(256 // scale.shape[1], 1)
    apart = (found - held).abs() / step
    assert (apart.round() <= 1).all()
    # The largest weight of a row is at a tie, which float32 may break either way.
    levels = (weight / factor.reciprocal() / step)[apart > 0.5]
    assert ((levels - levels.floor() - 0.5).abs() < 1e-3).all()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(48, 40), nn.Linear(48, 40)
        self.down_proj = nn.Linear(40, 48)

    def forward(self, hidden_states):
        gated = torch.tanh(self.q_proj(hidden_states)) * self.k_proj(hidden_states)
        return hidden_states + self.down_proj(gated)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def samples(count=8):
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 2, (1, 24), generator=generator)
        x = torch.randn(1, 24, 48, generator=generator)
        x[..., :4] *= 1 + 30 * ids[..., None]
        found.append({"x": x, "modality_ids": ids})
    return found


def learned(**options):
    torch.manual_seed(0)
    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    recipe = calibrate(
        model,
        samples(),
        scheme="w4a4",
        method=PAPER,
        modalities=NAMES,
        progress=False,
        **options,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    return model, recipe


def test_factors_are_learned_and_pairs_solved_for_them():
    model, closed = learned()
    again, recipe = learned(epochs=2)
    assert recipe.options.lr == 0.05
    for name, layer in recipe.layers.items():
        start = closed.layers[name]
        if name.endswith("down_proj"):
            assert torch.equal(layer.smoothing_factor, torch.ones(1, 40))
            continue
        moved = (layer.smoothing_factor - start.smoothing_factor).abs()
        # A step of Adam is of the size of the rate; 16 were taken.
        assert 0.01 < moved.max() <= 16 * 0.05 * 1.5
        assert (layer.smoothing_factor >= 1e-2).all()
        assert layer.ranks == (32,)
    first, second = (recipe.layers[f"layers.0.{n}"] for n in ("q_proj", "k_proj"))
    assert not torch.equal(first.smoothing_factor, second.smoothing_factor)
    # The pair is the best for the learned factor: what it leaves of W s - Q(W s_0) is
    # orthogonal, in the tokens' metric, to what it holds.
    weight = dict(again.named_parameters())["layers.0.q_proj.weight"].double()
    factors = first.smoothing_factor.double()
    qdata, scale, _ = quantize_smoothed_weight(
        weight.float(), first.smoothing_factor[0].reciprocal(), 4
    )
    difference = weight * factors[1] - dequantize_smoothed_weight(qdata, scale).double()
    tokens = torch.cat([s["x"][s["modality_ids"] == 1] for s in samples()]).double()
    met = tokens / factors[1]
    aim = met @ difference.t()
    left = aim - met @ first.l1.double() @ first.l2.double()
    tail = torch.linalg.svdvals(aim)[32:].square().sum().sqrt()
    assert left.norm() <= 1.02 * tail + 0.01 * aim.norm()


def test_divergence_is_an_error(monkeypatch):
    def diverged(self, y, target, ids):
        return y.sum() * torch.nan

    monkeypatch.setattr(PublishedTask, "_mean_absolute", diverged)
    with pytest.raises(
        ValueError, match="layers.0 diverged .* smaller lr, or epochs=0"
    ):
        learned(epochs=2)
