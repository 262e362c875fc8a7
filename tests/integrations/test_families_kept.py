# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Real model classes of many families: saved, loaded, block by block, and exported."""

import pytest
import torch
from checkpoints import (
    assert_same_files,
    assert_same_logits,
    assert_same_state,
    entry_of,
)
from families import FAMILIES
from linear_oracle import linears_of
from refusals import refused
from torchao.quantization import quantize_

from torchao_masquant import MASQuantHfConfig, calibrate, masquant_config
from torchao_masquant.deploy import decoder as deploy
from torchao_masquant.integrations.unloaded import unloaded_tensors
from torchao_masquant.sequential import calibrate_sequential

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@every_family
def test_saved_loaded_and_quantized_while_loading(family, tmp_path):
    """To the bit; and nothing of a file that is renamed or merged is lost."""
    family.model().save_pretrained(tmp_path / "dense")
    assert unloaded_tensors(family.model(), tmp_path / "dense") == {}
    if family.name == "Gemma 3n":
        pytest.skip("the tower of its small model is not one that a config describes")
    kind = type(family.model())
    model = kind.from_pretrained(tmp_path / "dense")
    options = {"rounding": "nearest", "clip": False, "alpha": 0.5, "separation": 1.0}
    recipe = calibrate(model, [family.mixed(1)], progress=False, **options)
    while_loading = kind.from_pretrained(
        tmp_path / "dense", quantization_config=MASQuantHfConfig(recipe=recipe)
    )
    quantize_(model, masquant_config(recipe))
    model.save_pretrained(tmp_path / "quantized")
    loaded = kind.from_pretrained(tmp_path / "quantized")
    assert linears_of(loaded).keys() == family.quantized
    for other in (loaded, while_loading):
        assert_same_state(model, other)
        assert_same_logits(model, other, family.mixed(3))


# What is particular about each: features added between the layers; experts; a mask of
# each layer's own; towers in the decoder; linear attention; no tower at all.
@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-VL",
        "Qwen3-Omni-MoE thinker",
        "Gemma 3",
        "Phi-4-multimodal",
        "MiniCPM-V 4.6",
        "Llama",
    ],
)
def test_one_block_at_a_time_gives_what_a_model_in_memory_does(name, tmp_path):
    family = next(f for f in FAMILIES if f.name == name)
    family.model().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    kind = type(family.model())
    model = kind.from_pretrained(tmp_path / "model")
    data = [family.mixed(1), family.padded(2)]
    options = {"rank": 2, "alpha": 0.5, "separation": 1.0, "progress": False}
    quantize_(model, masquant_config(calibrate(model, data, **options)))
    model.save_pretrained(tmp_path / "expected")
    calibrate_sequential(
        tmp_path / "model",
        data,
        output=tmp_path / "quantized",
        model_class=kind,
        **options,
    )
    # Integers, factors, pairs, shifts and biases: what a recipe holds is in there.
    assert_same_files(tmp_path / "expected", tmp_path / "quantized")
    told = [entry_of(tmp_path / n)["layers"] for n in ("expected", "quantized")]
    assert told[0].keys() == told[1].keys()
    assert kind.from_pretrained(tmp_path / "quantized")


# Families that a decoder which gets embeddings and positions, and looks back only, is not
# enough for.
NOT_EXPORTED = {
    "Qwen3-VL": "called with deepstack_visual_embeds",
    "Qwen3-VL-MoE": "called with deepstack_visual_embeds",
    "Qwen3-Omni-MoE thinker": "called with deepstack_visual_embeds",
    "Gemma 3": "looks ahead",
    "PaliGemma": "looks ahead",
    "Gemma 3n": "called with per_layer_inputs",
    "Phi-4-multimodal": "called with audio_embed_sizes",
    "MiniCPM-V 4.6": "has layers of linear_attention",
}


@torch.no_grad()
@every_family
def test_a_decoder_called_as_exported(family):
    """Dense models: nothing is rounded, so the results are equal to the last bits."""
    model = family.model()

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        deploy.check_layers(model)
        call = deploy.observe(model, family.mixed(1))
        return deploy.call_as_exported(model, call), call.logits

    if family.name in NOT_EXPORTED:
        with refused(NOT_EXPORTED[family.name]):
            found()
    else:
        torch.testing.assert_close(*found(), rtol=1e-4, atol=1e-4)
