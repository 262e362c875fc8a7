# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The digits model's shape: a Qwen2.5-Omni thinker of about four million parameters."""

from typing import Any

from transformers import Qwen2_5OmniThinkerConfig

from torchao_masquant.testing.digits import features
from torchao_masquant.testing.digits.vocabulary import TOKEN_ID, VOCABULARY

HIDDEN_SIZE = 256


def thinker_config() -> Qwen2_5OmniThinkerConfig:
    """Configuration of ``Qwen2_5OmniThinkerForConditionalGeneration``."""
    # Not fields of the configuration class; the first is read by the position ids.
    more_tokens: dict[str, Any] = {
        f"{name}_token_id": TOKEN_ID[f"<{name}>"]
        for name in ("vision_start", "vision_end", "pad", "bos", "eos")
    }
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
            "pad_token_id": TOKEN_ID["<pad>"],
            "bos_token_id": TOKEN_ID["<bos>"],
            "eos_token_id": TOKEN_ID["<eos>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "in_channels": features.CHANNELS,
            "patch_size": features.PATCH_SIZE,
            "spatial_merge_size": features.MERGE_SIZE,
            "temporal_patch_size": features.TEMPORAL_PATCH_SIZE,
            "window_size": features.IMAGE_SIZE,
            "fullatt_block_indexes": [0, 1],
            "out_hidden_size": HIDDEN_SIZE,
        },
        audio_config={
            "num_mel_bins": features.MEL_BINS,
            "d_model": 128,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 384,
            "max_source_positions": features.FRAMES,
            "output_dim": HIDDEN_SIZE,
        },
        audio_token_index=TOKEN_ID["<audio>"],
        image_token_index=TOKEN_ID["<image>"],
        video_token_index=TOKEN_ID["<video>"],
        audio_start_token_id=TOKEN_ID["<audio_start>"],
        audio_end_token_id=TOKEN_ID["<audio_end>"],
        tie_word_embeddings=False,
        **more_tokens,
    )
