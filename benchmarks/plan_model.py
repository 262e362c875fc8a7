# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model that ``plan_check.py`` calibrates and runs: random, but large enough to time."""

from pathlib import Path

import torch
import transformers

__all__ = ["TOKENS", "model_folder", "samples"]

#: Of a sample, and of those its image.
TOKENS, IMAGE_TOKENS = 192, 96
_GRID = (1, 16, 24)
_SPECIAL = dict(zip(("image", "video", "vision_start", "vision_end"), range(4)))


def model_folder(folder: Path, blocks: int = 4) -> Path:
    """A Qwen2.5-VL of 640 and 1792 channels in bfloat16, with a small tower."""
    text = {
        "vocab_size": 8192,
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": blocks,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
        },
        "bos_token_id": 4,
        "eos_token_id": 5,
        "pad_token_id": 6,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 640,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **{f"{name}_token_id": value for name, value in _SPECIAL.items()},
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_().mul_(parameter[0].numel() ** -0.5)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    """An image and words in each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        words = torch.randint(
            7, 8192, (TOKENS - IMAGE_TOKENS - 2,), generator=generator
        )
        image = [
            _SPECIAL["vision_start"],
            *[_SPECIAL["image"]] * IMAGE_TOKENS,
            _SPECIAL["vision_end"],
        ]
        ids = torch.cat((torch.tensor(image), words))[None]
        patches = _GRID[1] * _GRID[2]
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(patches, 24, generator=generator),
                "image_grid_thw": torch.tensor([_GRID]),
            }
        )
    return found
