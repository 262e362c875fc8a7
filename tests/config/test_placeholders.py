# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``prepare_for_loading`` makes room for all that a method's weights hold.

An engine that owns its memory fills a parameter in place, ``weight.copy_(loaded)``.
"""

import dataclasses
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantLinear, MASQuantTensor

MADE = [
    {"method": "masquant"},
    {"method": "masquant", "rank": 3, "low_rank_bits": 8},
    {"method": "masquant", "rank": 0, "shift": False},
    {"method": "masquant", "hadamard_size": 1},
    {"method": "masquant", "hadamard_size": 16},
    {"method": "masquant", "scheme": "w4a16", "group_size": 8},
    {"method": "masquant", "scheme": "w8a8", "group_size": 8, "rank": 0.3},
    {"method": "masquant-paper"},
    {"method": "smoothquant"},
    {"method": "rtn", "scheme": "w8a8"},
]


def _fixed(options: dict[str, Any]) -> dict[str, Any]:
    """One exponent, so that tests are fast."""
    fast = {"alpha": 0.5, "separation": 1.0} if options["method"] == "masquant" else {}
    return {**fast, **options}


@pytest.mark.parametrize("options", MADE, ids=str)
def test_weights_are_filled_in_place(options: dict[str, Any]) -> None:
    options = _fixed(options)
    model = tiny_models.quantized(tiny_models.omni_thinker(), **options)
    loaded = tiny_models.omni_thinker(seed=5)
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", **options))
    places = dict(loaded.named_parameters())
    for name, weight in model.state_dict().items():
        if isinstance(weight, MASQuantTensor):
            # Data of a low rank needs less of a pair than there is room for.
            parts = places[name].data.__tensor_flatten__()[0]
            assert parts == weight.__tensor_flatten__()[0], name
            assert places[name].data.hadamard_size == weight.hadamard_size, name
    loaded.load_state_dict(model.state_dict())
    # The same memory, with other values.
    assert all(p is places[n] for n, p in loaded.named_parameters())
    sample = tiny_models.samples(audio=True)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**sample).logits, model(**sample).logits)


@pytest.mark.parametrize("rank", [9, "auto"])
def test_ranks_that_the_options_did_not_tell(rank: object) -> None:
    """Only the data knows those of "auto": a weight takes the placeholder's place."""
    fast = {"alpha": 0.5, "separation": 1.0}
    model = tiny_models.quantized(tiny_models.omni_thinker(), rank=rank, **fast)
    loaded = tiny_models.omni_thinker(seed=5)
    told = {"rank": rank} if rank == "auto" else {}
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", **told))
    with pytest.raises(RuntimeError, match="the source's ranks are .* the target's"):
        loaded.load_state_dict(model.state_dict())
    loaded.load_state_dict(model.state_dict(), assign=True)
    sample = tiny_models.samples(audio=True)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**sample).logits, model(**sample).logits)


def test_rotations_that_the_options_did_not_tell() -> None:
    """They take no room, so that a state_dict brings its own along."""
    fast = {"alpha": 0.5, "separation": 1.0, "rounding": "nearest", "clip": False}
    model = tiny_models.omni_thinker()
    recipe = tiny_models.recipe_of(model, **fast)
    for i, name in enumerate(recipe.layers):
        if i % 3:
            layer = recipe.layers[name]
            recipe.layers[name] = dataclasses.replace(
                layer, hadamard_size=2 ** (1 + i % 4)
            )
    tiny_models.quantized(model, recipe)
    loaded = tiny_models.omni_thinker(seed=5)
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", **fast))
    loaded.load_state_dict(model.state_dict())
    sample = tiny_models.samples(audio=True)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**sample).logits, model(**sample).logits)
    # A weight that can't be loaded leaves the one that is there as it was.
    linear = next(m for m in loaded.modules() if isinstance(m, MASQuantLinear))
    before = linear.weight.hadamard_size
    wrong = MASQuantTensor.from_hp(torch.randn(linear.weight.shape), hadamard_size=16)
    with pytest.raises(RuntimeError, match="copy_ needs two MASQuantTensors of one"):
        linear.load_state_dict({"weight": wrong}, strict=False)
    assert linear.weight.hadamard_size == before


@pytest.mark.parametrize(
    "options", [{"hadamard_size": 64}, {"group_size": 64}], ids=str
)
def test_nothing_is_changed_where_an_option_does_not_suit_all(
    options: dict[str, Any],
) -> None:
    """The first linears' widths it does divide."""
    model = tiny_models.omni_thinker()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"=64 .*width \(96\) of 2 of 14 linears"):
        quantize_(model, MASQuantConfig(step="prepare_for_loading", **options))
    assert [type(module) for module in model.modules()] == before


def test_a_model_that_needs_no_routing_is_not_routed() -> None:
    options = {"method": "rtn", "modalities": ("text", "vision")}
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, MASQuantConfig(step="convert", **options))
    loaded = nn.Sequential(nn.Linear(32, 32))
    quantize_(loaded, MASQuantConfig(step="prepare_for_loading", **options))
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), model(x))
