# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized folders name tensors as the folder that they were made from does.

transformers' models have other names in memory than the hub's files, by which engines know
their layers.
"""

import pytest
import torch
import transformers
from safetensors import safe_open
from torchao.quantization import quantize_
from transformers import AutoModelForMultimodalLM

from torchao_masquant import calibrate, masquant_config, save_quantized
from torchao_masquant.integrations.checkpoint_format import parameter_of, stored_part
from torchao_masquant.testing import digits, model_folders

_MAKE = {
    "LLaVA": (model_folders.vision_model, AutoModelForMultimodalLM),
    "Qwen2-Audio": (model_folders.audio_model, AutoModelForMultimodalLM),
    "Qwen2.5-Omni": (
        digits.write_folder,
        transformers.Qwen2_5OmniForConditionalGeneration,
    ),
}


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("family", _MAKE)
def test_a_quantized_folder_has_the_names_of_the_original(tmp_path, family):
    make, kind = _MAKE[family]
    original = make(tmp_path / "original")
    model = kind.from_pretrained(original, dtype=torch.float32)
    samples = [{"input_ids": torch.randint(10, 50, (1, 8))}]
    options = {"modalities": ("text",), "effort": "fast", "progress": False}
    quantize_(model, masquant_config(calibrate(model, samples, **options)))
    save_quantized(model, tmp_path / "quantized", beside=original)
    parts = {name: stored_part(name) for name in names(tmp_path / "quantized")}
    saved = {
        name if part is None else parameter_of(part[0], (1, 1))
        for name, part in parts.items()
    }
    assert any(parts.values())
    assert saved == names(original)


def test_folders_of_tiny_models_have_the_names_of_the_hub(tmp_path):
    sees = names(model_folders.vision_model(tmp_path / "sees"))
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in sees
    assert "vision_tower.vision_model.pre_layrnorm.weight" in sees
    hears = names(model_folders.audio_model(tmp_path / "hears"))
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in hears
    assert "language_model.lm_head.weight" in hears
