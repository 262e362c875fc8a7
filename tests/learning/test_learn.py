# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Learning block by block, on a small stack of blocks and on the small model."""

import copy
import logging

import pytest
import tiny_models
import torch
from torch import nn
from transformers import Cache

from torchao_masquant import calibrate
from torchao_masquant.decoder_blocks import capture_calls, decoder_blocks
from torchao_masquant.learning.learnable_weight import LearnableWeight
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.routing import Router
from torchao_masquant.testing import digits

NAMES = ("text", "vision")
WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)

    def forward(self, hidden_states, gain=1.0, past_key_values=None):
        assert past_key_values is None
        return (hidden_states + gain * self.down(torch.tanh(self.up(hidden_states))),)


class Model(nn.Module):
    def __init__(self, added=0.0, twice=False):
        super().__init__()
        self.tower = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.added, self.twice, self.towers = added, twice, 0

    def forward(self, x):
        self.towers += 1
        x = self.tower(x)
        for index, layer in enumerate(self.layers):
            cache = [] if torch.is_grad_enabled() else None
            x = layer(hidden_states=x, gain=0.5, past_key_values=cache)[0]
            if index == 0:
                x = x + self.added
            if self.twice:
                x = layer(x)[0]
        return x


def _samples(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        ids = torch.randint(0, 2, (1, 12), generator=generator)
        x = torch.randn(1, 12, WIDTH, generator=generator)
        x[..., 3] += 20.0 * ids
        samples.append({"x": x, "modality_ids": ids})
    return samples


def _model(**options):
    torch.manual_seed(0)
    return Model(**options)


def _calibrate(model, samples, epochs, **options):
    return calibrate(
        model,
        samples,
        modalities=NAMES,
        include="layers.*",
        rank=2,
        alpha=0.5,
        separation=1.0,
        progress=False,
        epochs=epochs,
        **options,
    )


def _error(model, recipe, samples):
    """Of the last block's output, relative, mean over modalities, from its definition."""
    total = torch.zeros(2)
    energy = torch.zeros(2)
    for sample in samples:
        ids = sample["modality_ids"]
        exact = x = model.tower(sample["x"])
        for index, layer in enumerate(model.layers):
            exact = layer(exact, 0.5)[0]
            parts = [f"layers.{index}.{n}" for n in ("up", "down")]
            up, down = (
                recipe.layers[n].quantize(
                    model.get_submodule(n).weight.data,
                    recipe.options.number_format,
                    NAMES,
                )
                for n in parts
            )
            linear = torch.ops.masquant.linear
            hidden = torch.tanh(linear(x, up, ids, layer.up.bias))
            x = x + 0.5 * linear(hidden, down, ids, None)
            if index == 0:
                exact, x = exact + model.added, x + model.added
        for m in (0, 1):
            total[m] += (x - exact)[ids == m].square().sum()
            energy[m] += (exact[ids == m] - exact[ids == m].mean(0)).square().sum()
    return (total / energy).log().mean().item()


@pytest.mark.parametrize("scheme, added", [("w3a3", 1.5), ("w4a8", 0.0)])
@torch.no_grad()
def test_learned_beats_closed_form(scheme, added):
    """On samples that neither saw; also where the model adds between its blocks."""
    model, samples = _model(added=added), _samples(48)
    start = _calibrate(model, samples, 0, scheme=scheme)
    learned = _calibrate(model, samples, 6, scheme=scheme, lr=1e-3)
    unseen = _samples(32, seed=1)
    gain = _error(model, start, unseen) - _error(model, learned, unseen)
    assert gain > 0.05
    for name, layer in learned.layers.items():
        layer.check(name, 2)
        # What is learned are floats around the integers of the start.
        assert torch.equal(layer.qdata, start.layers[name].qdata)
        assert layer.l1.dtype == start.layers[name].l1.dtype
    assert learned.options.epochs == 6


def test_the_towers_run_as_often_as_without_learning():
    model, samples = _model(), _samples(8)
    counts = {}
    for epochs in (0, 1, 3):
        model.towers = 0
        _calibrate(model, samples, epochs)
        counts[epochs] = model.towers
    assert counts[1] == counts[3] == counts[0] + len(samples)


def test_the_model_is_left_as_it_was():
    model, samples = _model().train(), _samples(8)
    model.layers[1].up.weight.requires_grad_(False)
    model.layers[2].eval()
    before = copy.deepcopy(model.state_dict())

    def state():
        return (
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
            ["forward" in m.__dict__ for m in model.modules()],
            [
                len(m._forward_hooks) + len(m._forward_pre_hooks)
                for m in model.modules()
            ],
            [type(m) for m in model.modules()],
        )

    first = state()
    _calibrate(model, samples, 1)
    assert state() == first
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values())
    )
    assert all(p.grad is None for p in model.parameters())


def test_what_diverges_is_thrown_away(caplog):
    model, samples = _model(), _samples(16)
    start = _calibrate(model, samples, 0)
    with caplog.at_level(logging.WARNING):
        learned = _calibrate(model, samples, 2, lr=50.0)
    assert "learning of layers.0 diverged: the loss went from" in caplog.text
    for name, layer in start.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, learned.layers[name].tensors()[key])


def test_learning_needs_a_stack_of_blocks():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.first(x)

    with pytest.raises(ValueError, match="no nn.ModuleList of Flat holds all of its 1"):
        calibrate(Flat(), _samples(4), modalities=NAMES, epochs=1, progress=False)


def test_a_block_that_is_called_twice_is_refused():
    model = _model(twice=True)
    router = Router(NAMES)
    blocks = list(decoder_blocks(model, ["layers.0.up"]).values())
    with pytest.raises(ValueError, match="is not called once, after the block before"):
        capture_calls(model, blocks, _samples(2), router, progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "scheme, low_rank_bits, hadamard_size",
    [("w8a8", 8, None), ("w4a4", 16, 16), ("w4a4", 8, 16), ("w4a16", 16, 16)],
)
def test_starts_as_the_operator(scheme, low_rank_bits, hadamard_size):
    """Before a step its linear is ``masquant::linear``, and its result the start."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight = normal(10, 32)
    rounded = scheme != "w4a16"
    layer = LayerRecipe(
        shape=(10, 32),
        fingerprint="",
        smoothing_factor=normal(2, 32).exp(),
        ranks=(3,),
        l1=normal(32, 3).bfloat16(),
        l2=normal(3, 10).bfloat16(),
        modality_bias=normal(2, 10),
        act_shift=normal(2, 32) if rounded else None,
        hadamard_size=hadamard_size,
    )
    options = SolverOptions(scheme, group_size=16, low_rank_bits=low_rank_bits)
    quantized = layer.quantize(weight, options.number_format, NAMES, low_rank_bits)
    learnable = LearnableWeight(layer, quantized)
    x, ids, bias = (
        normal(2, 9, 32),
        torch.tensor([0, 1, 1] * 6).reshape(2, 9),
        normal(10),
    )
    for rows in (ids, None):
        expected = torch.ops.masquant.linear(x, quantized, rows, bias)
        y = learnable.linear(x, rows, bias)
        # Float32 in another order; a level in a thousand may round the other way.
        off = (y - expected).abs() > 1e-4 * expected.abs().max()
        assert off.float().mean() < 0.02
    again = learnable.result().quantize(
        weight, options.number_format, NAMES, low_rank_bits
    )
    assert again.hadamard_size == hadamard_size
    assert torch.equal(again.int_data(), quantized.int_data())
    for name in ("scale", "act_pre_scale", "act_shift", "l1", "l2", "modality_bias"):
        first, second = getattr(quantized, name), getattr(again, name)
        if first is not None:
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)


def test_every_part_has_a_gradient():
    weight = torch.randn(6, 16)
    layer = LayerRecipe(
        shape=(6, 16),
        fingerprint="",
        smoothing_factor=torch.rand(2, 16) + 0.5,
        ranks=(2,),
        l1=torch.randn(16, 2),
        l2=torch.randn(2, 6),
        modality_bias=torch.randn(2, 6),
        act_shift=torch.randn(2, 16),
        hadamard_size=4,
    )
    options = SolverOptions("w4a4")
    learnable = LearnableWeight(
        layer, layer.quantize(weight, options.number_format, NAMES)
    )
    ids = torch.tensor([[0, 1, 1, 0]])
    learnable.linear(torch.randn(1, 4, 16), ids, None).square().sum().backward()
    for name, delta in learnable.deltas.items():
        assert delta.grad is not None and delta.grad.abs().sum() > 0, name


def test_on_the_small_model(one_layer):
    """A real decoder: masks, rotary positions, a cache argument, padding.

    Of blocks that follow one another the tests above are.
    """
    model = digits.load_model("outliers")
    samples = digits.calibration_samples(16)
    options = dict(scheme="w4a4", alpha=0.5, separation=1.0, progress=False)
    start = calibrate(model, samples, **options)
    learned = calibrate(model, samples, epochs=1, **options)
    assert list(learned.layers) == list(start.layers)
    changed = [
        not torch.equal(learned.layers[n].scale, start.layers[n].scale)
        for n in start.layers
    ]
    assert any(changed)


def test_no_cache_is_kept():
    """One that is called ``cache``, too: it would grow by every call that is repeated."""
    model = tiny_models.qwen25_vl(2)
    blocks = decoder_blocks(model, ["model.language_model.layers.0.mlp.up_proj"])
    router = Router.for_model(model)
    calls = capture_calls(
        model,
        list(blocks.values()),
        tiny_models.samples(audio=False, count=1),
        router,
        progress=False,
    )
    values = [v for keywords in calls[0].keywords for v in keywords.values()]
    assert not any(isinstance(value, Cache) for value in values)
    block = list(blocks.values())[0]
    with torch.no_grad():
        outputs = [calls[0].run(0, block, calls[0].hidden) for _ in range(2)]
    assert torch.equal(*outputs)
