# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Gradients of batches, against autograd on the mean of the losses."""

import math

import pytest
import torch
from one_block import Model

from torchao_masquant import calibrate
from torchao_masquant.learning.batch_gradient import BatchGradient
from torchao_masquant.learning.batches import held_back
from torchao_masquant.learning.learnable_weight import LearnableWeight
from torchao_masquant.learning.together import Alone

NAMES = ("text", "vision")
WIDTH, COUNT, SIZE = 8, 20, 4


def samples():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(1, 6 + i % 3, WIDTH, generator=generator),
            "modality_ids": torch.randint(0, 2, (1, 6 + i % 3), generator=generator),
        }
        for i in range(COUNT)
    ]


def calibrated(model, **options):
    return calibrate(
        model,
        samples(),
        modalities=NAMES,
        scheme="w4a4",
        rank=2,
        alpha=0.5,
        separation=1.0,
        # A rotation's sums would be some more that differ.
        hadamard_size=1,
        progress=False,
        **options,
    )


def first_batch():
    """From the definition: one of each quarter of the samples, judges left out."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for start in range(0, COUNT, COUNT // SIZE):
        own = [i for i in range(start, start + COUNT // SIZE) if i not in (7, 15)]
        found.append(own[torch.randperm(len(own), generator=generator)[0]])
    return found


def losses(model, learnable, numbers):
    """Of the only block, each from its definition."""
    data, block = samples(), model.layers[0]
    with torch.no_grad():
        exact = [model(s["x"]) for s in data]
    energies = []
    for m in (0, 1):
        tokens = torch.cat([y[s["modality_ids"] == m] for y, s in zip(exact, data)])
        energies.append((tokens.double() - tokens.double().mean(0)).square().sum())
        energies[m] = (energies[m] / len(tokens)).item()
    found = []
    for i in numbers:
        x, ids = data[i]["x"], data[i]["modality_ids"]
        up, down = (learnable[f"layers.0.{n}"] for n in ("up", "down"))
        hidden = torch.tanh(up.linear(x, ids, block.up.bias))
        y = x + down.linear(hidden, ids, block.down.bias)
        error = (y - exact[i]).square().sum(-1)
        total = sum(
            weight / energy * error[ids == m].sum()
            for m, (energy, weight) in enumerate(zip(energies, (1.0, 1.0)))
        )
        found.append(total / ids.numel())
    return found


def test_a_step_is_of_the_mean_loss(monkeypatch):
    """What Adam is given at the first step of ``learn``."""
    torch.manual_seed(0)
    model = Model(WIDTH, 12)
    given = []
    step = torch.optim.Adam.step

    def watched(self, *args):
        if not given:
            given.extend(p.grad.clone() for p in self.param_groups[0]["params"])
        return step(self, *args)

    start = calibrated(model)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    calibrated(model, epochs=1, batch_size=SIZE)
    learnable = {
        name: LearnableWeight(
            layer,
            layer.quantize(
                model.get_submodule(name).weight.data,
                start.options.number_format,
                NAMES,
            ),
        )
        for name, layer in start.layers.items()
    }
    parameters = [p for w in learnable.values() for p in w.parameters()]
    batch = losses(model, learnable, first_batch())
    each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in batch]
    expected = torch.autograd.grad(sum(batch) / SIZE, parameters)
    assert len(given) == len(expected) > 0
    for value, reference, *own in zip(given, expected, *each):
        # A quarter of a float32 is exact: what differs are three sums, on either side.
        # The energies' own rounding is far below that of the float32 that they become.
        sizes = torch.stack(own).abs().sum(0) / SIZE
        assert (value - reference).abs().le(SIZE * 2.0**-24 * sizes).all()
        assert value.abs().sum() > 0


@pytest.mark.parametrize("size, steps", [(1, 18), (4, 5), (99, 1)])
def test_steps_of_an_epoch(monkeypatch, size, steps):
    calls = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: calls.append(1) or step(self)
    )
    recipe = calibrated(Model(WIDTH, 12), epochs=2, batch_size=size)
    assert len(calls) == 2 * steps
    assert recipe.options.batch_size == size
    taught, _ = held_back(COUNT)
    assert steps >= math.ceil(len(taught) / size)


def test_parameters_that_nothing_depends_on():
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    gradient = BatchGradient([first, second], Alone())
    gradient.add(torch.zeros(()))
    gradient.finish(1)
    assert first.grad is None and second.grad is None
    # A sample without a gradient counts as one of zeros.
    gradient.add((5 * first).sum())
    gradient.add(torch.zeros(()))
    gradient.finish(2)
    assert torch.equal(first.grad, torch.full((3,), 2.5)) and second.grad is None
    gradient.add((second * torch.arange(3)).sum())
    gradient.finish(1)
    assert first.grad is None and torch.equal(second.grad, torch.arange(3.0))


def test_small_gradients_are_not_lost_beside_large_ones():
    parameter = torch.ones(1, requires_grad=True)
    gradient = BatchGradient([parameter], Alone())
    for size in (1.0, *[2.0**-26] * 8, -1.0):
        gradient.add((size * parameter).sum())
    gradient.finish(8)
    assert parameter.grad.item() == 2.0**-26
