# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tiny whole Omni models, as the hub has them: they hear, see, write and speak."""

from pathlib import Path

import torch
import transformers
from tiny_models import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    omni_thinker,
)

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TALKER = {
    "vocab_size": 90,
    "embedding_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": _ROPE,
    "tts_text_start_token_id": 10,
    "tts_text_end_token_id": 11,
    "tts_text_pad_token_id": 12,
    "tts_codec_start_token_id": 83,
    "tts_codec_end_token_id": 84,
    "tts_codec_pad_token_id": 82,
    "tts_codec_mask_token_id": 86,
    "audio_token_index": AUDIO,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
}
TOKEN2WAV = {
    "dit_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "emb_dim": 16,
        "num_embeds": 90,
        "mel_dim": 8,
        "enc_emb_dim": 8,
        "enc_dim": 8,
        "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 8,
        "enc_res2net_scale": 2,
        "enc_se_channels": 8,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
    },
    "bigvgan_config": {
        "mel_dim": 8,
        "upsample_initial_channel": 64,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    },
}

SPEAKERS = {"Chelsie": {"bos_token": 1}}


def whole_omni(seed: int = 0) -> transformers.Qwen2_5OmniForConditionalGeneration:
    """Around ``tiny_models.omni_thinker``, with the same weights."""
    thinker = omni_thinker(seed=seed)
    torch.manual_seed(seed)
    whole = transformers.Qwen2_5OmniForConditionalGeneration(
        transformers.Qwen2_5OmniConfig(
            thinker_config=thinker.config.to_dict(),
            talker_config=TALKER,
            token2wav_config=TOKEN2WAV,
        )
    ).eval()
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.speaker_map = dict(SPEAKERS)
    return whole


def save_as_on_the_hub(
    whole: transformers.Qwen2_5OmniForConditionalGeneration, folder: Path
) -> Path:
    """With the speakers' voices, without which its class does not load it."""
    whole.save_pretrained(folder)
    torch.save(SPEAKERS, folder / "spk_dict.pt")
    return folder
