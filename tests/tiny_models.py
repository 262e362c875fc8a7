# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tiny random models of the real transformers classes, and inputs for them.

A prompt is a sequence of parts: an int is a text token, a string one placeholder run
("image", "small image" of one token, "video", "audio"). Image and sound tokens are
made much louder than text on a few channels, so that a misrouted token shows.
"""

from typing import Any, Optional, Sequence, Union

import torch
import transformers
from linear_oracle import ids_by_hand
from packaging.version import Version
from torch import nn
from torchao.quantization import quantize_
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from torchao_masquant import (
    MASQuantLinear,
    Recipe,
    Router,
    calibrate,
    masquant_config,
)

Part = Union[int, str]
Inputs = dict[str, Any]

#: Where an Omni thinker, such as the digits model, has its decoder.
OMNI_DECODER = (
    "model.language_model"
    if Version(transformers.__version__) >= Version("5.21")
    else "model"
)

PAD, BOS, EOS = 0, 1, 2
VISION_START, VISION_END, IMAGE, VIDEO = 3, 4, 5, 6
AUDIO_START, AUDIO_END, AUDIO = 7, 8, 9
FIRST_WORD, VOCABULARY = 10, 48
PLACEHOLDERS = {IMAGE: "vision", VIDEO: "vision", AUDIO: "audio"}

HIDDEN = 64
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    },
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "in_channels": 3,
    "in_chans": 3,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [0],
    "out_hidden_size": HIDDEN,
}
_PATCH_VALUES = 3 * 2 * 2 * 2
_MEL_BINS, _FRAMES = 8, 16

# (t, h, w) of each run, and its number of tokens.
_GRIDS = {"image": (1, 4, 4), "small image": (1, 2, 2), "video": (2, 2, 2)}
_LENGTHS = {"image": 4, "small image": 1, "video": 2, "audio": 4}
_TOKENS = {"image": IMAGE, "small image": IMAGE, "video": VIDEO, "audio": AUDIO}


def hears(model: Any) -> bool:
    """Whether it is the Omni thinker."""
    return hasattr(model.config, "audio_config")


def _prepared(model: Any, seed: int) -> Any:
    """Random weights of usable size, and loud image and sound tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # Of experts, (E, N, K), each is a matrix.
            expert = name.endswith(("gate_up_proj", "down_proj"))
            width = parameter.shape[-1] if expert else parameter[0].numel()
            parameter.data.normal_(generator=generator).mul_(width**-0.5)
    merger = model.get_submodule(
        "model.visual.merger" if hasattr(model.model, "visual") else "visual.merger"
    )
    last = merger.mlp[-1] if hasattr(merger, "mlp") else merger.linear_fc2
    last.bias.data[[3, 11]] = torch.tensor([30.0, -20.0])
    if hears(model):
        proj = model.get_submodule(
            "model.audio_tower.proj"
            if hasattr(model.model, "audio_tower")
            else "audio_tower.proj"
        )
        proj.bias.data[[7, 20, 40]] = torch.tensor([-25.0, 40.0, 9.0])
    return model.eval()


def qwen25_vl(layers: int = 2, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "num_hidden_layers": layers},
        vision_config=_VISION,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _prepared(Qwen2_5_VLForConditionalGeneration(config), seed)


def qwen25_vl_of_width(
    hidden: int, inner: int, layers: int
) -> Qwen2_5_VLForConditionalGeneration:
    """Of another size, with the weights that transformers gives it."""
    section = hidden // _TEXT["num_attention_heads"] // 8
    config = Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [section, section, 2 * section],
            },
        },
        vision_config={**_VISION, "out_hidden_size": hidden},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_moe(layers: int = 2, seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """Three of six experts for a token, so that the order of their sum shows."""
    torch.manual_seed(seed)
    config = Qwen3VLMoeConfig(
        text_config={
            **_TEXT,
            "num_hidden_layers": layers,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
        },
        vision_config={
            **_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _prepared(Qwen3VLMoeForConditionalGeneration(config), seed)


def omni_thinker(
    layers: int = 2, seed: int = 0
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen2_5OmniThinkerConfig(
        text_config={**_TEXT, "num_hidden_layers": layers},
        vision_config=_VISION,
        audio_config={
            "num_mel_bins": _MEL_BINS,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "max_source_positions": _FRAMES,
            "output_dim": HIDDEN,
        },
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return _prepared(Qwen2_5OmniThinkerForConditionalGeneration(config), seed)


class PlainModel(nn.Module):
    """No config, no input_ids: only token_modalities says what its tokens are."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def token_row(parts: Sequence[Part]) -> list[int]:
    """Token ids of one prompt."""
    row: list[int] = []
    for part in parts:
        if isinstance(part, int):
            row.append(part)
        elif part == "audio":
            row += [AUDIO_START, *[AUDIO] * _LENGTHS[part], AUDIO_END]
        else:
            run = [_TOKENS[part]] * _LENGTHS[part]
            row += [VISION_START, *run, VISION_END]
    return row


def features(prompts: Sequence[Sequence[Part]], seed: int, audio: bool) -> Inputs:
    """Random images, videos and sounds for prompts, in order."""
    generator = torch.Generator().manual_seed(seed)
    runs = [p for parts in prompts for p in parts if isinstance(p, str)]
    inputs: Inputs = {}
    for kinds, values, grids in (
        (("image", "small image"), "pixel_values", "image_grid_thw"),
        (("video",), "pixel_values_videos", "video_grid_thw"),
    ):
        thw = [_GRIDS[r] for r in runs if r in kinds]
        if thw:
            inputs[grids] = torch.tensor(thw)
            patches = int(inputs[grids].prod(-1).sum())
            inputs[values] = torch.randn(patches, _PATCH_VALUES, generator=generator)
    videos = runs.count("video")
    if videos and audio:
        inputs["video_second_per_grid"] = torch.full((videos,), 0.5)
    clips = runs.count("audio")
    if clips:
        inputs["input_features"] = torch.randn(
            clips, _MEL_BINS, _FRAMES, generator=generator
        )
        inputs["feature_attention_mask"] = torch.ones(clips, _FRAMES, dtype=torch.long)
    return inputs


def batch(*prompts: Sequence[Part], seed: int = 0, audio: bool = False) -> Inputs:
    """Keyword inputs for prompts, padded on the left to one length.

    Args:
        audio: for the Omni thinker, whose inputs differ.
    """
    rows = [token_row(parts) for parts in prompts]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(r)) + [1] * len(r) for r in rows]
        ),
        **features(prompts, seed, audio),
    }


def words(count: int, seed: int = 0) -> list[int]:
    """Random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


def samples(*, audio: bool, count: int = 4) -> list[Inputs]:
    """Calibration data with every modality."""
    runs: list[Part] = ["image", "video", *(["audio"] if audio else [])]
    return [
        batch([BOS, *words(6, s), *runs, *words(5, s + 100)], seed=s, audio=audio)
        for s in range(count)
    ]


def recipe_of(model: nn.Module, **options: Any) -> Recipe:
    """A recipe for one of the models above."""
    options.setdefault("scheme", "w4a8")
    options.setdefault("progress", False)
    if isinstance(model, PlainModel):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4, 3, 10, 16, generator=generator)
        ids = torch.randint(0, 3, (4, 3, 10), generator=generator)
        loudness = torch.ones(3, 16)
        loudness[1, 2], loudness[2, 5:7] = 30.0, 20.0
        data = [{"x": a * loudness[i], "modality_ids": i} for a, i in zip(x, ids)]
        options.setdefault("modalities", ("text", "vision", "audio"))
        return calibrate(model, data, **options)
    return calibrate(model, samples(audio=hears(model)), **options)


def quantized(model: Any, recipe: Optional[Recipe] = None, **options: Any) -> Any:
    """``model`` itself, quantized; calibrated on its own data unless a recipe is given."""
    if recipe is None:
        recipe = recipe_of(model, **options)
    quantize_(model, masquant_config(recipe))
    return model


def router(model: nn.Module) -> Router:
    """The router of a quantized model."""
    return next(m.router for m in model.modules() if isinstance(m, MASQuantLinear))


def true_ids(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Modality ids of a call, found by a plain loop over its ``input_ids``."""
    return ids_by_hand(
        router(model).modalities,
        PLACEHOLDERS,
        inputs["input_ids"],
        inputs.get("attention_mask"),
    )
