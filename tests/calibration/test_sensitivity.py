# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Sensitivity of modalities, against gradients taken by finite differences."""

import copy

import pytest
import tiny_models
import torch
from tiny_models import OMNI_DECODER

from torchao_masquant import calibrate, modality_sensitivity
from torchao_masquant.routing import Router
from torchao_masquant.testing import digits

LINEAR = f"{OMNI_DECODER}.layers.1.mlp.up_proj"


def test_equals_finite_differences():
    name = "model.language_model.layers.1.mlp.up_proj"
    model, sample = tiny_models.qwen25_vl(), tiny_models.samples(audio=False)[0]
    found = modality_sensitivity(model, [sample], include=name, progress=False)
    model = model.double()
    sample = {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
    ids = Router.for_model(model).ids_of(sample["input_ids"])
    moved = {}

    @torch.no_grad()
    def loss():
        logits = model(**sample).logits
        return torch.nn.functional.cross_entropy(
            logits[0], labels, reduction="sum"
        ).item()

    linear = model.get_submodule(name)
    handle = linear.register_forward_hook(
        lambda m, a, y: y + moved.get("by", torch.zeros_like(y))
    )
    with torch.no_grad():
        logits = model(**sample).logits
    labels = logits[0].argmax(-1)
    generator = torch.Generator().manual_seed(0)
    sizes = {0: [], 1: []}
    width, step = linear.out_features, 1e-5
    for modality, found_sizes in sizes.items():
        tokens = (ids[0] == modality).nonzero().flatten()
        for _ in range(60):
            token = tokens[torch.randint(len(tokens), (1,), generator=generator)].item()
            channel = torch.randint(width, (1,), generator=generator).item()
            values = []
            for sign in (1, -1):
                moved["by"] = torch.zeros(1, ids.shape[1], width, dtype=torch.float64)
                moved["by"][0, token, channel] = sign * step
                values.append(loss())
            found_sizes.append(abs(values[0] - values[1]) / (2 * step))
    handle.remove()
    expected = sum(sizes[1]) / sum(sizes[0])
    assert found["text"] == 1 and "audio" not in found
    # Means of 60 random elements out of thousands: within a factor of two.
    assert 0.5 < found["vision"] / expected < 2


def test_the_model_is_left_as_it_was():
    model = digits.load_model("plain")
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    found = modality_sensitivity(
        model, digits.calibration_samples()[:6], progress=False
    )
    assert set(found) == {"text", "vision", "audio"}
    assert all(value > 0 for value in found.values())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    recipe = calibrate(
        model,
        digits.calibration_samples()[:6],
        include=LINEAR,
        modality_weights=found,
        progress=False,
    )
    assert recipe.options.modality_weights == found


def test_nothing_to_measure_is_said():
    with pytest.raises(ValueError, match="samples is empty: sensitivities need"):
        modality_sensitivity(digits.load_model("plain"), [], progress=False)
