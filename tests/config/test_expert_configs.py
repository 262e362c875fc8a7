# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``quantize_`` on models whose experts are no linears."""

import copy

import pytest
import torch
from expert_models import LAYOUTS, NAMES, MoEModel, sample, samples
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantExperts,
    MASQuantLinear,
    calibrate,
    masquant_config,
    token_modalities,
)
from torchao_masquant.routing import router_of

FIXED = {"alpha": 0.5, "separation": 1.0}


def recipe_of(model, **options):
    options = {"modalities": NAMES, "scheme": "w4a8", **FIXED, **options}
    return calibrate(model, samples(), progress=False, **options)


@torch.no_grad()
def output(model):
    one = sample(9)
    with token_modalities(model, one["modality_ids"]):
        return model(one["x"])


def test_one_line_quantizes_experts_with_the_linears():
    model = MoEModel()
    quantize_(model, masquant_config(recipe_of(model)))
    assert type(model.first) is MASQuantLinear
    assert isinstance(model.experts, MASQuantExperts)
    assert model.experts.fqn == "experts"
    assert model.experts.router is model.first.router is router_of(model)
    assert output(model).isfinite().all()


@pytest.mark.parametrize("layout", ["gated", "transposed"])
def test_steps_give_what_the_recipe_gives(layout):
    model, stepped = MoEModel(layout), MoEModel(layout)
    quantize_(model, masquant_config(recipe_of(model)))
    options = {"scheme": "w4a8", "modalities": NAMES, **FIXED}
    quantize_(stepped, MASQuantConfig(step="prepare", **options))
    for one in samples():
        with token_modalities(stepped, one["modality_ids"]), torch.no_grad():
            stepped(one["x"])
    quantize_(stepped, MASQuantConfig(step="convert", **options))
    assert isinstance(stepped.experts, MASQuantExperts)
    assert torch.equal(output(stepped), output(model))


def test_linears_and_experts_prepared_apart_are_converted_at_once():
    model, stepped = MoEModel(), MoEModel()
    quantize_(model, masquant_config(recipe_of(model)))
    options = {"scheme": "w4a8", "modalities": NAMES, **FIXED}
    for part in ("first", "experts.*"):
        quantize_(stepped, MASQuantConfig(step="prepare", include=part, **options))
    for one in samples():
        with token_modalities(stepped, one["modality_ids"]), torch.no_grad():
            stepped(one["x"])
    quantize_(stepped, MASQuantConfig(step="convert", **options))
    assert torch.equal(output(stepped), output(model))


@pytest.mark.parametrize("layout", ["gated", "transposed"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_saved_state_loads_bit_identical(layout, assign, tmp_path):
    """In the placeholder's memory too, which has room for each expert's own shift."""
    model = MoEModel(layout)
    quantize_(model, masquant_config(recipe_of(model)))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = MoEModel(layout, seed=1)
    config = MASQuantConfig(step="prepare_for_loading", scheme="w4a8", modalities=NAMES)
    quantize_(loaded, config)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.load_state_dict(state, assign=assign)
    assert torch.equal(output(loaded), output(model))
    assert loaded.experts.routed


def test_states_that_do_not_fit():
    model = MoEModel()
    dense = copy.deepcopy(model.state_dict())
    quantize_(model, masquant_config(recipe_of(model)))
    with pytest.raises(RuntimeError, match="experts.gate_up_proj is quantized, the"):
        model.load_state_dict(
            {
                **model.state_dict(),
                **{name: value for name, value in dense.items() if "experts" in name},
            }
        )
    other = MoEModel()
    quantize_(
        other,
        MASQuantConfig(
            step="prepare_for_loading", scheme="w4a8", modalities=("text", "audio")
        ),
    )
    with pytest.raises(RuntimeError, match="experts.gate_up_proj: the checkpoint was"):
        other.load_state_dict(model.state_dict(), assign=True)


def test_placeholders_on_the_meta_device():
    loaded = MoEModel().to("meta")
    quantize_(
        loaded,
        MASQuantConfig(step="prepare_for_loading", scheme="w4a8", modalities=NAMES),
    )
    assert loaded.experts.gate_up_proj.is_meta
    model = MoEModel()
    quantize_(model, masquant_config(recipe_of(model)))
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(output(loaded), output(model))


def test_a_choice_of_modules_is_the_callers():
    recipe = recipe_of(MoEModel())
    model = MoEModel()
    only_linears = lambda module, name: isinstance(module, nn.Linear)  # noqa: E731
    quantize_(model, masquant_config(recipe), filter_fn=only_linears)
    assert type(model.first) is MASQuantLinear
    assert type(model.experts) is LAYOUTS["gated"]
    model = MoEModel()
    quantize_(model, masquant_config(recipe), filter_fn=lambda _, n: n == "experts")
    assert type(model.first) is nn.Linear
    assert isinstance(model.experts, MASQuantExperts)


def test_fqn_to_config_names_the_module_of_the_experts():
    model = MoEModel()
    linears = masquant_config(recipe_of(model, exclude="experts.*"))
    experts = masquant_config(recipe_of(model, include="experts.*", scheme="w8a8"))
    quantize_(
        model, FqnToConfig({"first": linears, "re:.*experts": experts}), filter_fn=None
    )
    assert model.first.weight.weight_bits == 4
    assert model.experts.down_proj.weight_bits == 8
    assert output(model).isfinite().all()


def test_patterns_narrow_a_recipe_down():
    model = MoEModel()
    recipe = recipe_of(model)
    without = copy.deepcopy(model)
    quantize_(without, masquant_config(recipe, exclude="experts.*"))
    assert type(without.experts) is LAYOUTS["gated"]
    quantize_(without, masquant_config(recipe, include="experts.*"))
    assert isinstance(without.experts, MASQuantExperts)
    whole = copy.deepcopy(model)
    quantize_(whole, masquant_config(recipe))
    assert torch.equal(output(without), output(whole))
    with pytest.raises(ValueError, match="^experts are quantized as a whole, and exp"):
        quantize_(model, masquant_config(recipe, exclude="*.down_proj"))
    assert type(model.first) is nn.Linear


def test_recipes_of_other_experts():
    model = MoEModel()
    recipe = recipe_of(model)
    changed = copy.deepcopy(model)
    changed.experts.down_proj.data[3, 0, 0] += 1
    with pytest.raises(ValueError, match="^experts.down_proj: .* with fingerprint"):
        quantize_(changed, masquant_config(recipe))
    with pytest.raises(ValueError, match="^experts.gate_up_proj: .* of shape"):
        quantize_(MoEModel("transposed").bfloat16(), masquant_config(_reshaped(recipe)))
    with pytest.raises(ValueError, match="this one has no experts.gate_up_proj; use"):
        quantize_(MoEModel("not gated"), masquant_config(recipe))
    with pytest.raises(ValueError, match="^experts.gate_up_proj is on the meta device"):
        quantize_(MoEModel().to("meta"), masquant_config(recipe, include="experts.*"))
    quantize_(model, masquant_config(recipe))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_(model, masquant_config(recipe))
    with pytest.raises(ValueError, match="^experts.gate_up_proj is quantized or obser"):
        recipe_of(model, include="experts.*")


def _reshaped(recipe):
    """The same recipe without its linear, for experts of another number."""
    layers = {n: copy.copy(p) for n, p in recipe.layers.items() if "experts" in n}
    for layer in layers.values():
        for name, tensor in layer.tensors().items():
            if tensor.dim() == 3:
                setattr(layer, name, tensor[:3])
        layer.shape = (3, *layer.shape[1:])
    return type(recipe)(recipe.options, recipe.modalities, layers)
