# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of tiny random models that vLLM takes, as :mod:`model_folders` has of others."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from whole_omni import SPEAKERS, TALKER, TOKEN2WAV

from torchao_masquant.testing import model_folders

__all__ = ["OMNI_SIGHT", "SIGHT", "SOUND", "llama", "omni", "omni_thinker"]
__all__ += ["qwen2_audio", "qwen25_vl", "qwen2_vl"]

#: How a prompt says where an image or a sound is.
SIGHT = "<|vision_start|><|image_pad|><|vision_end|>"
OMNI_SIGHT = "<|vision_start|><|IMAGE|><|vision_end|>"
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"

_VL_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_OMNI_TOKENS = {
    **_VL_TOKENS,
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}

_PATCH = 4
_PIXELS = {
    "patch_size": _PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}
_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": _PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_WINDOWED = {
    **_VISION,
    "hidden_size": 64,
    "intermediate_size": 96,
    "out_hidden_size": 64,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
_MEL_BINS = 16


def _text() -> dict[str, Any]:
    return {
        **model_folders._TEXT,
        "vocab_size": 384,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [6, 5, 5],
        },
    }


def _tokenizer(tokens: dict[str, str]) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model_folders._tokenizer().backend_tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=tokens,
    )


def _images() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return Qwen2VLImageProcessorPil(**_PIXELS)


def _sees(
    folder: Path, model_class: Any, config_class: Any, processor_class: Any, vision: Any
) -> Path:
    tokenizer = _tokenizer(_VL_TOKENS)
    start, end, image, video = tokenizer.convert_tokens_to_ids(
        list(_VL_TOKENS.values())
    )
    config = config_class(
        text_config=_text(),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    processor = processor_class(
        _images(),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**_PIXELS),
        chat_template=model_folders.TEMPLATE.replace("<image>", SIGHT),
    )
    torch.manual_seed(0)
    return model_folders._saved(model_class(config), processor, folder)


def qwen2_vl(folder: Path) -> Path:
    """Sees 24 x 24 pixels as 9 tokens."""
    return _sees(
        folder,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLProcessor,
        {**_VISION, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2},
    )


def qwen25_vl(folder: Path) -> Path:
    """The same, with attention in windows."""
    return _sees(
        folder,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLProcessor,
        _WINDOWED,
    )


def _whole_omni() -> tuple[Any, Any]:
    """A whole Qwen2.5-Omni that sees, hears and speaks, and its processor."""
    tokenizer = _tokenizer(_OMNI_TOKENS)
    known = {n: tokenizer.convert_tokens_to_ids(t) for n, t in _OMNI_TOKENS.items()}
    tokens = {
        "image_token_index": known["image_token"],
        "video_token_index": known["video_token"],
        "audio_token_index": known["audio_token"],
        "vision_start_token_id": known["vision_bos_token"],
        "vision_end_token_id": known["vision_eos_token"],
        "audio_start_token_id": known["audio_bos_token"],
        "audio_end_token_id": known["audio_eos_token"],
    }
    thinker = {
        "text_config": _text(),
        "vision_config": _WINDOWED,
        "audio_config": {
            "num_mel_bins": _MEL_BINS,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "max_source_positions": 1500,
            "output_dim": 64,
        },
        "tie_word_embeddings": False,
        **tokens,
    }
    processor = transformers.Qwen2_5OmniProcessor(
        _images(),
        transformers.Qwen2VLVideoProcessor(**_PIXELS),
        transformers.WhisperFeatureExtractor(feature_size=_MEL_BINS),
        tokenizer,
        chat_template=model_folders.TEMPLATE.replace("<image>", OMNI_SIGHT),
    )
    torch.manual_seed(0)
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config={**TALKER, **tokens},
        token2wav_config=TOKEN2WAV,
    )
    return transformers.Qwen2_5OmniForConditionalGeneration(config), processor


def omni(folder: Path) -> Path:
    """A whole Qwen2.5-Omni, as it is on the hub, whose talker vLLM leaves out."""
    folder = model_folders._saved(*_whole_omni(), folder)
    torch.save(SPEAKERS, folder / "spk_dict.pt")
    return folder


def omni_thinker(folder: Path) -> Path:
    """Its thinker alone, as that class of transformers saves it."""
    whole, processor = _whole_omni()
    return model_folders._saved(whole.thinker, processor, folder)


def qwen2_audio(folder: Path) -> Path:
    """Of windows of thirty seconds, which are all that vLLM's tower takes."""
    with (
        mock.patch.dict(model_folders._AUDIO, {"max_source_positions": 1500}),
        mock.patch.object(model_folders, "_SECONDS", 30),
    ):
        return model_folders.audio_model(folder)


def llama(folder: Path) -> Path:
    """It reads."""
    config = transformers.LlamaConfig(**model_folders._TEXT)
    torch.manual_seed(0)
    return model_folders._saved(
        transformers.LlamaForCausalLM(config), model_folders._tokenizer(), folder
    )
