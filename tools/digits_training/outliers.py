# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Activation outliers for the variant "outliers". They are trained in, on purpose.

In multimodal LLMs of usual size a few channels of image and sound tokens are tens of
times larger than the rest, and the ranges of the modalities differ by as much. A model
of four million parameters does not grow such channels within minutes of training. So
large constants are added to a few output channels of both towers, which puts them on
the residual stream of every image and sound token (and of no text token), and training
continues with these constants frozen until the model has adapted to them.
"""

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from torchao_masquant.testing.digits.examples import TaskExamples

# Constants in units of the root mean square of the tower's own output.
VISION_MAGNITUDE = 110.0
AUDIO_MAGNITUDE = 190.0
VISION_OUTLIERS = {17: 1.0, 74: -0.6, 139: 0.6, 213: -1.0}  # channel -> multiple
AUDIO_OUTLIERS = {17: -1.0, 74: 1.0, 139: 0.6, 213: 0.6}


@torch.no_grad()
def add_outliers(
    model: Qwen2_5OmniThinkerForConditionalGeneration, examples: TaskExamples
) -> None:
    """Add the constants to the output biases of both towers and freeze these biases.

    Args:
        model: The trained model, changed in place.
        examples: Training examples with images and sound, to measure the outputs on.
    """
    inputs = examples.batch().inputs
    vision = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    audio = model.get_audio_features(
        inputs["input_features"], inputs["feature_attention_mask"]
    )
    for bias, output, magnitude, outliers in (
        (
            model.model.visual.merger.mlp[2].bias,
            torch.cat(tuple(vision.pooler_output)),
            VISION_MAGNITUDE,
            VISION_OUTLIERS,
        ),
        (
            model.model.audio_tower.proj.bias,
            audio.last_hidden_state,
            AUDIO_MAGNITUDE,
            AUDIO_OUTLIERS,
        ),
    ):
        unit = magnitude * output.square().mean().sqrt()
        for channel, multiple in outliers.items():
            bias[channel] += multiple * unit
        bias.requires_grad_(False)
