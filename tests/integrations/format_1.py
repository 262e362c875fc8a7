# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The checkpoint of format version 1 in ``data/format_1``, and how it was made.

``python tests/integrations/format_1.py FOLDER`` makes one again; that of the repository
stays as it is, so that later versions are held to reading it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from torchao_masquant import calibrate, masquant_config, save_quantized

FOLDER = Path(__file__).parent / "data" / "format_1"
OUTPUTS = "outputs.safetensors"

IMAGE = 6

# Every part that a weight can have is in one of them.
QUANTIZATIONS = (
    {
        "include": "*.layers.*.self_attn.*",
        "scheme": "w4a8",
        "rank": 2,
        "low_rank_bits": 8,
    },
    {
        "include": ["*.layers.*.gate_proj", "*.layers.*.up_proj"],
        "scheme": "w8a8",
        "rank": 2,
    },
    {"include": "*.layers.*.down_proj", "scheme": "w4a16", "rank": 2, "group_size": 16},
)


def model() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=7,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=False,
    )
    made = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_().mul_(parameter[0].numel() ** -0.5)
    return made


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """Two prompts with an image each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, 24, (2, 8), generator=generator)
    image = torch.tensor([[4, *[IMAGE] * 4, 5]]).expand(2, -1)
    ids = torch.cat([words[:, :4], image, words[:, 4:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 24, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def main(folder: Path) -> None:
    made = model()
    samples = [inputs(seed) for seed in range(1, 9)]
    recipes = [
        calibrate(made, samples, alpha=0.5, separation=1.0, progress=False, **options)
        for options in QUANTIZATIONS
    ]
    for recipe in recipes:
        quantize_(made, masquant_config(recipe))
    save_quantized(made, folder)
    prompt = inputs(0)
    with torch.no_grad():
        prompt["logits"] = made(**inputs(0)).logits
    save_file(prompt, folder / OUTPUTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
