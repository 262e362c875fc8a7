# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A tiny random GLM-OCR, with a layer that predicts a further token."""

from pathlib import Path

import qwen_folders
import torch
import transformers
from safetensors.torch import load_file, save_file

from torchao_masquant.testing import model_folders

__all__ = ["SIGHT", "glm_ocr"]

#: How a prompt says where an image is.
SIGHT = "<|begin_of_image|><|image|><|end_of_image|>"

_TOKENS = {
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "image": "<|image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
    "video": "<|video|>",
}
_PIXELS = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128, "longest_edge": 8192},
}


def glm_ocr(folder: Path) -> Path:
    """The layer behind the last is a copy of it, and transformers does not load it."""
    from transformers.models.glm46v.image_processing_pil_glm46v import (
        Glm46VImageProcessorPil,
    )

    names = {f"{kind}_token": token for kind, token in _TOKENS.items()}
    tokenizer = qwen_folders._tokenizer(names)
    processor = transformers.Glm46VProcessor(
        Glm46VImageProcessorPil(**_PIXELS),
        tokenizer,
        transformers.Glm46VVideoProcessor(**_PIXELS),
        chat_template=model_folders.TEMPLATE.replace("<image>", SIGHT),
    )
    text = {**qwen_folders._text(), "num_nextn_predict_layers": 1}
    text["rope_parameters"]["partial_rotary_factor"] = 1.0
    config = transformers.GlmOcrConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
        },
        **{
            f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token)
            for kind, token in _TOKENS.items()
        },
    )
    torch.manual_seed(0)
    model = transformers.GlmOcrForConditionalGeneration(config)
    file = model_folders._saved(model, processor, folder) / "model.safetensors"
    tensors = load_file(file)
    last, further = (f"model.language_model.layers.{i}." for i in (1, 2))
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace(last, further)] = tensors[name].clone()
    head = tensors["lm_head.weight"]
    width = head.shape[1]
    embeddings = tensors["model.language_model.embed_tokens.weight"]
    tensors |= {
        f"{further}enorm.weight": torch.ones(width),
        f"{further}hnorm.weight": torch.ones(width),
        f"{further}eh_proj.weight": torch.eye(width).repeat(1, 2),
        f"{further}shared_head.norm.weight": torch.ones(width),
        f"{further}shared_head.head.weight": head.clone(),
        f"{further}embed_tokens.weight": embeddings.clone(),
    }
    save_file(tensors, file, {"format": "pt"})
    return folder
