# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears that share an input, whatever the model does with it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, calibrate, token_modalities
from torchao_masquant.calibration.groups import SharedInputs
from torchao_masquant.calibration.session import MASQuantObservedLinear

NAMES = ("text", "radar")


def _data(count=4, width=8):
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(10) >= 6).long().expand(2, -1)
    loud = 1 + 9 * ids[..., None]
    return [
        {
            "x": torch.randn(2, 10, width, generator=generator) * loud,
            "modality_ids": ids,
        }
        for _ in range(count)
    ]


def _calibrate(model, samples=None, **options):
    options = {"modalities": NAMES, "progress": False, "rank": 2} | options
    return calibrate(model, samples or _data(), **options)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (lambda x: x, lambda x: x.view(24, 8), True),
        (lambda x: x, lambda x: x.view(2, 2, 6, 8), True),
        (lambda x: x[None], lambda x: x.unsqueeze(2), True),
        (lambda x: x[:, :3], lambda x: x[:, :3].unsqueeze(0), True),
        (lambda x: x, lambda x: x.detach(), True),
        (lambda x: x, lambda x: x.clone(), False),
        (lambda x: x, lambda x: x.bfloat16(), False),
        (lambda x: x, lambda x: x.view(3, 4, 16), False),
        (lambda x: x[:2], lambda x: x[2:], False),
        # As many rows from the same place, but others.
        (lambda x: x[:2], lambda x: x[::2], False),
        (lambda x: x[:, :3], lambda x: x[:, ::2], False),
        (lambda x: x[0, :, :4], lambda x: x[0, ::2].reshape(6, 4), False),
        (lambda x: x.view(24, 8)[:8], lambda x: x.view(24, 8)[:8].t(), False),
    ],
)
def test_the_same_rows_and_no_others(first, second, same):
    x = torch.randn(4, 6, 8)
    inputs = SharedInputs()
    a, b = first(x), second(x)
    assert inputs.leader("a", a) == "a"
    assert inputs.leader("b", b) == ("a" if same else "b")


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_also_in_inference_mode(inference):
    inputs = SharedInputs()
    with torch.inference_mode(inference):
        x = torch.randn(3, 8)
        assert inputs.leader("q", x) == "q"
        assert inputs.leader("k", x) == "q"
        x.mul_(2)
        assert inputs.leader("o", x) == "o"


def test_a_copy_forgets():
    """Weak references to storages can't be copied: both would free them."""
    inputs = SharedInputs()
    x = torch.randn(3, 8)
    assert inputs.leader("q", x) == "q"
    other = copy.deepcopy(inputs)
    assert other.leader("k", x) == "k"
    assert inputs.leader("k", x) == "q"


def test_an_observed_model_can_be_copied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.first(x) + self.second(x)

    model = Model()
    quantize_(model, MASQuantConfig(step="prepare", modalities=NAMES))
    sample = _data(1)[0]
    # Held on to, so that its storage is alive when the model is copied.
    x = sample["x"]
    with token_modalities(model, sample["modality_ids"]):
        model(x)
    other = copy.deepcopy(model)
    session = other.first.session
    assert session is other.second.session is not model.first.session
    assert session.linears == {"first": other.first, "second": other.second}
    with token_modalities(other, sample["modality_ids"]):
        other(x)
    counts = [
        [m.count for m in net.first.session.statistics["first"].moments]
        for net in (model, other)
    ]
    assert counts == [[12, 8], [24, 16]]
    for net in (model, other):
        quantize_(net, MASQuantConfig(step="convert"))
    del other
    gc.collect()


def test_observation_keeps_no_input_alive():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.alive = []

        def forward(self, x):
            x = x + 1
            self.alive.append(weakref.ref(x))
            return self.first(x) + self.second(x)

    model = Model()
    _calibrate(model)
    gc.collect()
    assert len(model.alive) == 5 and all(ref() is None for ref in model.alive)


class Drifting(nn.Module):
    """``pine`` reads what ``oak`` reads, until ``x`` is loud."""

    def __init__(self, when):
        super().__init__()
        self.oak, self.pine = nn.Linear(8, 8), nn.Linear(8, 8)
        self.when = when
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        drift = self.calls >= self.when
        return self.oak(x) + self.pine(x * 100 if drift else x)


def test_inputs_that_part_later_are_refused():
    """In place of statistics that leave the second one's inputs out in silence."""
    # Call 1 is the look at which linears share; the samples follow.
    model = Drifting(when=4)
    with pytest.raises(ValueError) as error:
        _calibrate(model)
    assert str(error.value) == (
        "pine read the same tensor as oak when it was first called, and another one "
        "later, so that neither one smoothing factor nor two suit them: exclude pine or "
        "oak."
    )
    assert type(model.oak) is type(model.pine) is nn.Linear
    layers = _calibrate(Drifting(when=1)).layers
    assert not torch.equal(
        layers["oak"].smoothing_factor, layers["pine"].smoothing_factor
    )


def test_a_layer_called_several_times_a_pass():
    """Shared weights (ALBERT): the layer's linears share each time anew."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for _ in range(3):
                x = x + self.down(torch.tanh(self.up(x) * self.gate(x)))
            return x

    torch.manual_seed(0)
    model = Model()
    layers = _calibrate(model, method="masquant-paper").layers
    assert torch.equal(layers["up"].smoothing_factor, layers["gate"].smoothing_factor)
    assert not torch.equal(
        layers["up"].smoothing_factor, layers["down"].smoothing_factor
    )
    absmax = torch.zeros(2, 8)
    for sample in _data():
        x = sample["x"]
        for _ in range(3):
            for m in (0, 1):
                tokens = x[sample["modality_ids"] == m]
                absmax[m] = torch.maximum(absmax[m], tokens.abs().amax(0))
            x = model.down(torch.tanh(model.up(x) * model.gate(x))) + x
    largest = torch.maximum(
        model.up.weight.abs().amax(0), model.gate.weight.abs().amax(0)
    )
    # Text's factor has no gauge: rounding of float32 alone, and of two square roots.
    torch.testing.assert_close(
        layers["up"].smoothing_factor[0],
        (absmax[0] / largest).sqrt(),
        rtol=1e-6,
        atol=0,
    )


# Traced, the weak references would be made and dropped half built.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_compiled_layer_is_observed():
    """Regional compilation: Dynamo leaves the observation alone."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.sigmoid(self.up(x)) * self.gate(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model = Model()
    eager = _calibrate(model)
    model.layer.compile(backend="eager")
    compiled = _calibrate(model)
    for name, layer in eager.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(tensor, compiled.layers[name].tensors()[key]), name
    assert type(model.layer.up) is nn.Linear


def test_an_observed_linear_is_one_linear_again():
    model = Drifting(when=99)
    before = {name: dict(vars(m)) for name, m in model.named_modules() if name}
    _calibrate(model)
    for name, state in before.items():
        module = model.get_submodule(name)
        assert not isinstance(module, MASQuantObservedLinear)
        assert vars(module).keys() == state.keys()
