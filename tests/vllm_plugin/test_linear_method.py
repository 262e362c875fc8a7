# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is left of a linear's loading when it is over."""

import gc
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from torchao_masquant.integrations.checkpoint_format import flatten_state_dict
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor

pytest.importorskip("vllm")

from torchao_masquant.vllm_plugin import linear_method  # noqa: E402
from torchao_masquant.vllm_plugin.linear_method import (  # noqa: E402
    MASQuantLinearMethod,
)

#: Of no other weight that is about.
_SHAPE = (24, 72)


@pytest.fixture
def loaders():
    """Those of a layer of two shards that has loaded them, as vLLM keeps them; and the
    layer."""
    names = ("gate_proj", "up_proj")
    weights = {
        f"{n}.weight": MASQuantTensor.from_hp(torch.randn(_SHAPE)) for n in names
    }
    layer = torch.nn.Module()
    layer.tp_rank, layer.tp_size, layer.prefix = 0, 1, "gate_up_proj"
    layer.output_sizes = [_SHAPE[0]] * 2
    formats = {n: LayerFormat.of(weights[f"{n}.weight"]) for n in names}
    config = SimpleNamespace(check_claimed=lambda: None)
    method = MASQuantLinearMethod(config, formats, None)
    load_config = SimpleNamespace(load_format="auto")
    asked = SimpleNamespace(lora_config=None, load_config=load_config)
    with mock.patch.object(linear_method, "get_current_vllm_config", lambda: asked):
        method.create_weights(
            layer, _SHAPE[1], layer.output_sizes, _SHAPE[1], 48, torch.float32
        )
    places = dict(layer.named_parameters())
    for name, tensor in flatten_state_dict(weights).items():
        shard, _, part = name.partition(".")
        place = places[part]
        place.weight_loader(place, tensor, names.index(shard))
    method.process_weights_after_loading(layer)
    return places, layer


def test_a_weight_is_held_once(loaders):
    gc.collect()
    held = [o for o in gc.get_objects() if isinstance(o, MASQuantTensor)]
    assert [weight for weight in held if weight.shape == _SHAPE] == []


def test_nothing_is_loaded_again(loaders):
    place = loaders[0]["_weight_scale"]
    with pytest.raises(ValueError, match="not loaded again .* start vLLM anew"):
        place.weight_loader(place, torch.zeros(1), 0)
