# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The recipes and checkpoints of earlier versions in ``data``, and how they were made.

``python tests/files/earlier_files.py FOLDER [HADAMARD_SIZE [SCHEME]]`` makes such a folder
with the version that is installed, SCHEME being that of the linears. Those of the repository stay as they are, so that later versions
are held to reading them:

- ``format_2``: a checkpoint of format 2, and its recipes of format 2 (linears) and 3
  (experts), by commit 4f16eb3;
- ``format_3``: a checkpoint of format 3, by commit 4883196 with a HADAMARD_SIZE of 1; its
  recipes are of the same formats as those above, and not kept;
- ``format_4``: a checkpoint and its recipes, all of format 4, by commit 4883196;
- ``format_5``: a checkpoint of format 5, and its recipes of format 5 (linears) and 4
  (experts), by commit 3075b0a with a HADAMARD_SIZE of 16 and SCHEME nvfp4.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchao.quantization import quantize_
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from torchao_masquant import calibrate, masquant_config, save_quantized

DATA = Path(__file__).parent / "data"
OUTPUTS = "outputs.safetensors"

IMAGE = 6

# File of a recipe to what it is of.
RECIPES: dict[str, dict[str, Any]] = {
    "linears.safetensors": {
        "include": "*.layers.*.self_attn.*",
        "scheme": "w4a8",
        "rank": 2,
        "low_rank_bits": 8,
    },
    "experts.safetensors": {
        "include": "*.experts.*",
        "scheme": "w4a16",
        "rank": 1,
        "group_size": 8,
    },
}


def _values(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Of a few bits, which every processor makes alike."""
    return torch.randint(-64, 65, shape, generator=generator) / 64


def model() -> Qwen3VLMoeForConditionalGeneration:
    """All of whose experts see every token: none is chosen for another's rounding."""
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 16,
            "hidden_size": 16,
            "intermediate_size": 16,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "in_channels": 3,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=IMAGE,
        video_token_id=7,
        vision_start_token_id=4,
        vision_end_token_id=5,
        tie_word_embeddings=False,
    )
    made = Qwen3VLMoeForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            # A power of two: no value is rounded.
            parameter.data = _values(*parameter.shape, generator=generator) / 4
    return made


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """Two prompts with an image each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, 16, (2, 8), generator=generator)
    image = torch.tensor([[4, *[IMAGE] * 4, 5]]).expand(2, -1)
    ids = torch.cat([words[:, :4], image, words[:, 4:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": _values(32, 24, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def main(folder: Path, scheme: str = "w4a8", **options: Any) -> None:
    made = model()
    RECIPES["linears.safetensors"]["scheme"] = scheme
    samples = [inputs(seed) for seed in range(1, 9)]
    recipes = {
        name: calibrate(
            made,
            samples,
            alpha=0.5,
            separation=1.0,
            progress=False,
            **of_recipe,
            **options,
        )
        for name, of_recipe in RECIPES.items()
    }
    for recipe in recipes.values():
        quantize_(made, masquant_config(recipe))
    save_quantized(made, folder)
    for name, recipe in recipes.items():
        recipe.save(folder / name)
    with torch.no_grad():
        logits = made(**inputs(0)).logits
    save_file({"logits": logits.contiguous()}, folder / OUTPUTS)


if __name__ == "__main__":
    sizes = {"hadamard_size": int(size) for size in sys.argv[2:3]}
    main(Path(sys.argv[1]), *sys.argv[3:], **sizes)
