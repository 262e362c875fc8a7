# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of tiny random mixtures of experts, as :mod:`model_folders` has of other models."""

from pathlib import Path
from typing import Any

import torch
import transformers

from torchao_masquant.testing import model_folders

__all__ = ["SIGHT", "deepseek_v2", "granite_moe", "mixtral", "qwen3_moe"]
__all__ += ["qwen3_vl_moe"]

_TOKENS = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

#: How a prompt says where an image is.
SIGHT = "<|vision_start|><|image_pad|><|vision_end|>"

_EXPERTS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}


def _text() -> dict[str, Any]:
    return {**model_folders._TEXT, **_EXPERTS}


def _saved(model_class: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    return model_folders._saved(model_class(config), processor, folder)


def _tokenizer() -> Any:
    tokenizer = model_folders._tokenizer()
    tokenizer.chat_template = model_folders.TEMPLATE
    return tokenizer


def qwen3_moe(folder: Path) -> Path:
    """A mixture in which a token's experts weigh one together."""
    config = transformers.Qwen3MoeConfig(**_text(), norm_topk_prob=True)
    return _saved(transformers.Qwen3MoeForCausalLM, config, _tokenizer(), folder)


def mixtral(folder: Path) -> Path:
    """A mixture whose files have other names than its model in transformers."""
    config = transformers.MixtralConfig(**_text())
    return _saved(transformers.MixtralForCausalLM, config, _tokenizer(), folder)


def granite_moe(folder: Path) -> Path:
    """A mixture that has Mixtral's name in transformers, too."""
    config = transformers.GraniteMoeConfig(**_text())
    return _saved(transformers.GraniteMoeForCausalLM, config, _tokenizer(), folder)


def deepseek_v2(folder: Path) -> Path:
    """A mixture that vLLM loads by code of the model's own."""
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 2,
    }
    mixture = {
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
    }
    config = transformers.DeepseekV2Config(**_text() | latent | mixture)
    return _saved(transformers.DeepseekV2ForCausalLM, config, _tokenizer(), folder)


def qwen3_vl_moe(folder: Path) -> Path:
    """A mixture that sees 24 x 16 pixels as 6 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model_folders._tokenizer().backend_tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=_TOKENS,
    )
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(_TOKENS.values()))
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **_text(),
            "vocab_size": 384,
            # What transformers does in any case, and vLLM asks for.
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    pixels = {
        "patch_size": 4,
        "merge_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
    }
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**pixels),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**pixels),
        chat_template=model_folders.TEMPLATE.replace("<image>", SIGHT),
    )
    model_class = transformers.Qwen3VLMoeForConditionalGeneration
    return _saved(model_class, config, processor, folder)
