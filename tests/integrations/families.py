# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tiny random models of the real transformers classes, a family of models each.

A :class:`Family` says what must be found about a model: its placeholder tokens, the
linears of its decoder, how far it compiles. Those are written down here by hand, from
the model's own code, and the tests hold torchao_masquant to them.
"""

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Callable, Mapping, Optional, Sequence
from unittest import mock

import torch
import transformers
from linear_oracle import ids_by_hand
from tiny_models import OMNI_DECODER
from torch import nn

Inputs = dict[str, Any]

PAD, BOS, EOS, START, END = 0, 1, 2, 3, 4
IMAGE, VIDEO, AUDIO = 5, 6, 7
AUDIO_START, AUDIO_END = 8, 9
FIRST_WORD, VOCABULARY = 10, 64

HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2

ATTENTION = tuple(f"self_attn.{n}_proj" for n in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISION: Mapping[str, tuple[int, ...]] = {"text": (), "vision": (IMAGE,)}
VISION_VIDEO: Mapping[str, tuple[int, ...]] = {"text": (), "vision": (IMAGE, VIDEO)}
SOUND: Mapping[str, tuple[int, ...]] = {"text": (), "audio": (AUDIO,)}

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT = {
    **_SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A family of models, and what is to be found about it.

    Attributes:
        name: as its users call it.
        build: makes the tiny model, weights not yet set.
        features: makes the inputs of one call that are no tokens, random.
        runs: placeholder runs of the mixed prompt: the tokens that open and close it
            (None for none), the placeholder, its number.
        modalities: each modality's placeholder tokens.
        decoder: name of the module that holds the decoder's ``layers``.
        layers: names of the linears of each decoder layer, in the layer.
        more_linears: full names of the decoder's other linears to quantize.
        small: last parts of the names of linears that, at the size of these models,
            would take more bytes quantized than they do.
        types: name of the input in which the model wants each token's type (0 text, 1
            image, 2 video, 3 audio).
        compiles: the largest part that transformers lets compile with
            ``fullgraph=True``: "language model" or "layer".
        has_experts: whether layers without a linear MLP have experts in its place.
    """

    name: str
    build: Callable[[], Any]
    features: Callable[[torch.Generator], Inputs] = lambda generator: {}
    runs: Sequence[tuple[Optional[int], int, int, Optional[int]]] = ()
    modalities: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"text": ()}
    )
    decoder: str = "model.language_model"
    layers: Sequence[Sequence[str]] = (ATTENTION + MLP,) * LAYERS
    more_linears: Sequence[str] = ()
    small: Sequence[str] = ()
    types: Optional[str] = None
    compiles: str = "language model"
    has_experts: bool = False

    @property
    def quantized(self) -> set[str]:
        """Full names of the linears that are quantized at this size."""
        return {n for n in self.linears if n.rpartition(".")[2] not in self.small}

    @property
    def linears(self) -> set[str]:
        """Full names of the linears to quantize."""
        of_layers = {
            f"{self.decoder}.layers.{layer}.{name}"
            for layer, names in enumerate(self.layers)
            for name in names
        }
        return of_layers | set(self.more_linears)

    @property
    def experts(self) -> set[str]:
        """Full names of the modules of experts to quantize."""
        return {
            f"{self.decoder}.layers.{layer}.mlp.experts"
            for layer, names in enumerate(self.layers)
            if self.has_experts and "mlp.up_proj" not in names
        }

    def model(self) -> Any:
        """The model, with random weights of usable size."""
        return copy.deepcopy(_model(self.build))

    def mixed(self, seed: int = 0) -> Inputs:
        """Inputs of a call with every kind of placeholder (of text alone without)."""
        row = [BOS, *_words(6, seed)]
        for index, (start, token, length, end) in enumerate(self.runs):
            row += [] if start is None else [start]
            row += [token] * length
            row += [] if end is None else [end]
            row += _words(4 + index, 100 * seed + index)
        return {
            **self._tokens(row),
            **self.features(torch.Generator().manual_seed(seed)),
        }

    def text(self, seed: int = 0) -> Inputs:
        """Inputs of a call without a placeholder."""
        return self._tokens([BOS, *_words(5, seed)])

    def padded(self, seed: int = 0) -> Inputs:
        """The mixed prompt and one of text, padded on the left."""
        mixed, text = self.mixed(seed), self.text(seed)
        for name, value in text.items():
            missing = mixed[name].shape[1] - value.shape[1]
            mixed[name] = torch.cat(
                [mixed[name], nn.functional.pad(value, (missing, 0))]
            )
        return mixed

    def _tokens(self, row: list[int]) -> Inputs:
        input_ids = torch.tensor([row])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.types is not None:
            kinds = {IMAGE: 1, VIDEO: 2, AUDIO: 3}
            inputs[self.types] = torch.tensor([[kinds.get(token, 0) for token in row]])
        return inputs

    def ids(self, inputs: Inputs) -> torch.Tensor:
        """What each token's modality id must be: (batch, sequence)."""
        names = {t: m for m, tokens in self.modalities.items() for t in tokens}
        modalities = list(self.modalities)
        return ids_by_hand(
            modalities, names, inputs["input_ids"], inputs["attention_mask"]
        )


def _words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


@cache
def _model(build: Callable[[], Any]) -> Any:
    """Made once: transformers takes longer for it than most tests for theirs."""
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # (experts, K, N) are several matrices.
            width = parameter[(0,) * (parameter.dim() == 3)].shape[-1]
            parameter.data.normal_(generator=generator).mul_(width**-0.5)
    return model.eval()


def _builds(kind: str, **config: Any) -> Callable[[], Any]:
    """What makes the model of a kind, such as "Qwen2VL", by its config."""

    def build() -> Any:
        made = getattr(transformers, f"{kind}Config")(
            # Some configs keep what they are given.
            **copy.deepcopy({"tie_word_embeddings": False, **config})
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(made)

    return build


# Qwen-VL and its kin: patches in one row, (t, h, w) of each image beside them.

_QWEN_RUNS = ((START, IMAGE, 4, END), (START, VIDEO, 2, END))
# From Qwen3-VL on, timestamps come between the frames of a video.
_FRAME_RUNS = ((START, IMAGE, 4, END), (START, VIDEO, 1, END), (START, VIDEO, 1, END))
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _mrope(section: Sequence[int], **more: Any) -> Inputs:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(section),
            **more,
        }
    }


def _image_patches(generator: torch.Generator) -> Inputs:
    """An image of 4 tokens."""
    return {
        "pixel_values": torch.randn(16, 24, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _patches(generator: torch.Generator) -> Inputs:
    """An image of 4 tokens and a video of 2."""
    return {
        **_image_patches(generator),
        "pixel_values_videos": torch.randn(8, 24, generator=generator),
        "video_grid_thw": torch.tensor([[2, 2, 2]]),
    }


_PATCH = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_TEXT = {**_TEXT, **_mrope((2, 3, 3))}
_QWEN_VISION = {
    **_PATCH,
    "depth": 1,
    "num_heads": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": HIDDEN,
}
_WINDOWS = {**_QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [0]}
_DEEP_TEXT = {**_TEXT, **_mrope((4, 2, 2), mrope_interleaved=True)}
_DEEP_VISION = {
    **_QWEN_VISION,
    "depth": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}

# Omni thinkers.

_OMNI_RUNS = (*_QWEN_RUNS, (AUDIO_START, AUDIO, 4, AUDIO_END))
_OMNI_IDS = {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
    **_SPECIAL,
}
_MEL, _FRAMES = 8, 16
_QWEN_AUDIO = {
    "num_mel_bins": _MEL,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "max_source_positions": _FRAMES,
}


def _omni_features(generator: torch.Generator) -> Inputs:
    return {
        **_patches(generator),
        "video_second_per_grid": torch.tensor([0.5]),
        "input_features": torch.randn(1, _MEL, _FRAMES, generator=generator),
        "feature_attention_mask": torch.ones(1, _FRAMES, dtype=torch.long),
    }


# Sounds alone.


def _qwen2_audio_features(generator: torch.Generator) -> Inputs:
    frames = 2 * _FRAMES
    return {
        "input_features": torch.randn(1, _MEL, frames, generator=generator),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }


def _voxtral_features(generator: torch.Generator) -> Inputs:
    return {"input_features": torch.randn(1, _MEL, 2 * _FRAMES, generator=generator)}


_VOXTRAL_AUDIO = {
    "hidden_size": 32,
    # Four neighbours make one token.
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": _MEL,
    "max_source_positions": _FRAMES,
}

# Images of a fixed size.


def _text(model_type: str) -> Inputs:
    return {"model_type": model_type, **_TEXT}


def _vision(model_type: str, size: int, patch: int, **more: Any) -> Inputs:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": size,
        "patch_size": patch,
        **more,
    }


def _image(*shape: int, **more: Any) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: {
        "pixel_values": torch.randn(*shape, generator=generator),
        **more,
    }


_ONE_SIZE = _image(1, 3, 8, 8, image_sizes=torch.tensor([[8, 8]]))


def _one_image(length: int = 4) -> tuple[tuple[int, int, int, int], ...]:
    return ((START, IMAGE, length, END),)


def _onevision_features(generator: torch.Generator) -> Inputs:
    # The whole image and its only tile, which has a token more at the end of each row;
    # a video of two frames, two tokens each dimension pooled to one, and one at the end.
    return {
        "pixel_values": torch.randn(1, 2, 3, 8, 8, generator=generator),
        "image_sizes": torch.tensor([[8, 8]]),
        "pixel_values_videos": torch.randn(1, 2, 3, 8, 8, generator=generator),
    }


# Those that torchao_masquant has an entry of its own for.


def _phi4() -> Any:
    return transformers.Phi4MultimodalForCausalLM(
        transformers.Phi4MultimodalConfig(
            **_TEXT,
            vision_config={
                **_vision("phi4_multimodal_vision", 8, 2),
                "num_hidden_layers": 2,
                "crop_size": 8,
                "image_token_id": IMAGE,
            },
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "input_size": _MEL,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 8,
                "audio_token_id": AUDIO,
            },
        )
    )


def _phi4_features(generator: torch.Generator) -> Inputs:
    # Two rows of two tokens and one that ends them, for the image and for its only
    # tile, and a token between the two; one token for eight frames.
    return {
        "image_pixel_values": torch.randn(1, 2, 3, 8, 8, generator=generator),
        "image_sizes": torch.tensor([[8, 8]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
        "audio_input_features": torch.randn(1, 32, _MEL, generator=generator),
        "audio_embed_sizes": torch.tensor([4]),
    }


_IMAGE_3N, _AUDIO_3N, _VOCABULARY_3N = 65, 73, 80


class _SmallTower(nn.Module):
    """In place of Gemma 3n's MobileNet, which needs timm: (B, 3, 8, 8) to (B, 32, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            last_hidden_state=self.patches(pixel_values)
        )


def _gemma3n() -> Any:
    config = transformers.Gemma3nConfig(
        text_config={
            **_TEXT,
            "vocab_size": _VOCABULARY_3N,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            # The last two read keys and values of the first two.
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "laurel_rank": 8,
        },
        vision_config={"hidden_size": 32, "vocab_size": 8, "vocab_offset": VOCABULARY},
        audio_config={
            "vocab_size": 8,
            "vocab_offset": VOCABULARY + 8,
            "input_feat_size": 16,
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 8],
            "conf_conv_kernel_size": 3,
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
        },
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=4,
        image_token_id=_IMAGE_3N,
        audio_token_id=_AUDIO_3N,
        boi_token_id=START,
        eoi_token_id=VOCABULARY,
        boa_token_id=AUDIO_START,
        eoa_token_id=VOCABULARY + 8,
        tie_word_embeddings=False,
    )
    from_config = transformers.AutoModel.from_config

    def without_timm(config: Any, **options: Any) -> Any:
        small = config.model_type == "gemma3n_vision"
        return _SmallTower() if small else from_config(config, **options)

    with mock.patch.object(transformers.AutoModel, "from_config", without_timm):
        return transformers.Gemma3nForConditionalGeneration(config)


def _gemma3n_features(generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
        "input_features": torch.randn(1, 32, 16, generator=generator),
        "input_features_mask": torch.ones(1, 32, dtype=torch.bool),
    }


def _minicpm_features(generator: torch.Generator) -> Inputs:
    # Patches of 2 x 2 side by side; 4 x 4 of them make a token.
    return {
        "pixel_values": torch.randn(1, 3, 2, 64, generator=generator),
        "target_sizes": torch.tensor([[4, 8]], dtype=torch.int32),
        "pixel_values_videos": torch.randn(1, 3, 2, 64, generator=generator),
        "target_sizes_videos": torch.tensor([[4, 4], [4, 4]], dtype=torch.int32),
    }


# Text alone.


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_TEXT))


_PHI = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_GEMMA3N = (
    *MLP,
    "laurel.linear_left",
    "laurel.linear_right",
    "per_layer_input_gate",
    "per_layer_projection",
)
_GEMMA3N_WHOLE = (
    "per_layer_model_projection",
    *(f"altup_projections.{i}" for i in range(3)),
    *(f"altup_unembed_projections.{i}" for i in range(3)),
)
_DELTA = (
    *(f"linear_attn.in_proj_{n}" for n in ("qkv", "z", "b", "a")),
    "linear_attn.out_proj",
)


FAMILIES = (
    Family(
        "Qwen2-VL",
        _builds(
            "Qwen2VL",
            text_config=_QWEN_TEXT,
            vision_config={
                **_PATCH,
                "depth": 1,
                "num_heads": 2,
                "in_channels": 3,
                "embed_dim": 32,
                "mlp_ratio": 2,
                "hidden_size": HIDDEN,
            },
            **_QWEN_IDS,
        ),
        _patches,
        _QWEN_RUNS,
        VISION_VIDEO,
        types="mm_token_type_ids",
    ),
    Family(
        "Qwen2.5-VL",
        _builds(
            "Qwen2_5_VL", text_config=_QWEN_TEXT, vision_config=_WINDOWS, **_QWEN_IDS
        ),
        _patches,
        _QWEN_RUNS,
        VISION_VIDEO,
        types="mm_token_type_ids",
    ),
    Family(
        "Qwen2.5-Omni thinker",
        _builds(
            "Qwen2_5OmniThinker",
            text_config=_QWEN_TEXT,
            vision_config={**_WINDOWS, "in_chans": 3},
            audio_config={**_QWEN_AUDIO, "output_dim": HIDDEN},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=AUDIO,
            **_OMNI_IDS,
        ),
        _omni_features,
        _OMNI_RUNS,
        {**VISION_VIDEO, **SOUND},
        decoder=OMNI_DECODER,
    ),
    Family(
        "Qwen3-VL",
        _builds(
            "Qwen3VL", text_config=_DEEP_TEXT, vision_config=_DEEP_VISION, **_QWEN_IDS
        ),
        _patches,
        _FRAME_RUNS,
        VISION_VIDEO,
        types="mm_token_type_ids",
    ),
    Family(
        "Qwen3-VL-MoE",
        _builds(
            "Qwen3VLMoe",
            text_config={**_DEEP_TEXT, **_EXPERTS, "mlp_only_layers": [0]},
            vision_config=_DEEP_VISION,
            **_QWEN_IDS,
        ),
        _patches,
        _FRAME_RUNS,
        VISION_VIDEO,
        # Only the second layer has experts.
        layers=(ATTENTION + MLP, ATTENTION),
        has_experts=True,
        types="mm_token_type_ids",
    ),
    Family(
        "Qwen3-Omni-MoE thinker",
        _builds(
            "Qwen3OmniMoeThinker",
            text_config={**_DEEP_TEXT, **_EXPERTS},
            vision_config=_DEEP_VISION,
            audio_config={
                **_QWEN_AUDIO,
                "output_dim": HIDDEN,
                "downsample_hidden_size": 8,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            **_OMNI_IDS,
        ),
        _omni_features,
        (*_QWEN_RUNS, (AUDIO_START, AUDIO, 2, AUDIO_END)),
        {**VISION_VIDEO, **SOUND},
        decoder=OMNI_DECODER,
        layers=(ATTENTION,) * LAYERS,
        has_experts=True,
    ),
    Family(
        "GLM-4V",
        _builds(
            "Glm4v",
            text_config=_QWEN_TEXT,
            vision_config={**_QWEN_VISION, "image_size": 8},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=AUDIO_START,
            video_end_token_id=AUDIO_END,
        ),
        _image_patches,
        _one_image(),
        VISION_VIDEO,
        layers=((*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"),) * LAYERS,
        types="mm_token_type_ids",
    ),
    Family(
        "Qwen2-Audio",
        _builds(
            "Qwen2Audio",
            text_config=_text("qwen2"),
            audio_config=_QWEN_AUDIO,
            audio_token_index=AUDIO,
        ),
        _qwen2_audio_features,
        ((AUDIO_START, AUDIO, 8, AUDIO_END),),
        SOUND,
    ),
    Family(
        "Voxtral",
        _builds(
            "Voxtral",
            text_config=_text("llama"),
            audio_config=_VOXTRAL_AUDIO,
            audio_token_id=AUDIO,
        ),
        _voxtral_features,
        ((None, AUDIO, 4, None),),
        SOUND,
    ),
    Family(
        "LLaVA-OneVision",
        _builds(
            "LlavaOnevision",
            text_config=_text("qwen2"),
            vision_config=_vision("siglip_vision_model", 8, 4, vision_use_head=False),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[8, 8]],
        ),
        _onevision_features,
        ((None, IMAGE, 10, None), (None, VIDEO, 3, None)),
        VISION_VIDEO,
    ),
    Family(
        "InternVL",
        _builds(
            "InternVL",
            text_config=_text("qwen2"),
            vision_config={
                **_vision("internvl_vision", 8, 2),
                "image_size": [8, 8],
                "patch_size": [2, 2],
            },
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        _image(1, 3, 8, 8),
        _one_image(),
        VISION,
    ),
    Family(
        "Gemma 3",
        _builds(
            "Gemma3",
            text_config={
                **_TEXT,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": HIDDEN // HEADS,
            },
            vision_config=_vision("siglip_vision_model", 8, 2),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        _image(1, 3, 8, 8),
        _one_image(),
        VISION,
        types="token_type_ids",
    ),
    *(
        Family(
            kind,
            _builds(
                kind,
                text_config=_text("llama"),
                vision_config=_vision(f"{kind.lower()}_vision", 8, 2),
                image_token_id=IMAGE,
                scale_factor=2,
                pad_token_id=PAD,
            ),
            _image(1, 1, 3, 8, 8),
            _one_image(),
            VISION,
            decoder="model.text_model",
        )
        for kind in ("SmolVLM", "Idefics3")
    ),
    Family(
        "Mistral 3",
        _builds(
            "Mistral3",
            text_config=_text("mistral"),
            vision_config=_vision("pixtral", 8, 2),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        _ONE_SIZE,
        ((None, IMAGE, 4, END),),
        VISION,
    ),
    Family(
        "Pixtral",
        _builds(
            "Llava",
            text_config=_text("mistral"),
            vision_config=_vision("pixtral", 8, 4),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _ONE_SIZE,
        ((None, IMAGE, 4, END),),
        VISION,
    ),
    Family(
        "PaliGemma",
        _builds(
            "PaliGemma",
            text_config=_text("gemma"),
            vision_config=_vision(
                "siglip_vision_model",
                8,
                4,
                projection_dim=HIDDEN,
                vision_use_head=False,
            ),
            image_token_index=IMAGE,
            projection_dim=HIDDEN,
            hidden_size=HIDDEN,
            vocab_size=VOCABULARY,
            **_SPECIAL,
        ),
        _image(1, 3, 8, 8),
        ((None, IMAGE, 4, None),),
        VISION,
        types="token_type_ids",
    ),
    Family(
        "Phi-4-multimodal",
        _phi4,
        _phi4_features,
        ((None, IMAGE, 13, None), (None, AUDIO, 4, None)),
        {**VISION, **SOUND},
        decoder="model",
        layers=(_PHI,) * LAYERS,
        # Its decoder looks at the values of input_ids, for images and sounds.
        compiles="layer",
    ),
    Family(
        "Gemma 3n",
        _gemma3n,
        _gemma3n_features,
        (
            (START, _IMAGE_3N, 4, VOCABULARY),
            (AUDIO_START, _AUDIO_3N, 4, VOCABULARY + 8),
        ),
        {"text": (), "vision": (_IMAGE_3N,), "audio": (_AUDIO_3N,)},
        layers=(ATTENTION + _GEMMA3N,) * 2
        + (("self_attn.q_proj", "self_attn.o_proj") + _GEMMA3N,) * 2,
        more_linears=[f"model.language_model.{n}" for n in _GEMMA3N_WHOLE],
        small=("linear_left", "per_layer_input_gate"),
    ),
    Family(
        "MiniCPM-V 4.6",
        _builds(
            "MiniCPMV4_6",
            text_config={
                **_text("qwen3_5_text"),
                **_mrope((2, 1, 1), partial_rotary_factor=0.5),
                "layer_types": ["linear_attention", "full_attention"],
                "linear_conv_kernel_dim": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            vision_config=_vision("minicpmv4_6_vision", 16, 2),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            insert_layer_id=0,
            image_size=16,
        ),
        _minicpm_features,
        ((START, IMAGE, 2, END), (START, VIDEO, 2, END)),
        VISION_VIDEO,
        layers=(_DELTA + MLP, ATTENTION + MLP),
        small=("in_proj_a", "in_proj_b"),
    ),
    Family("Llama", _llama, decoder="model"),
    Family("Qwen3", _qwen3, decoder="model"),
)

#: Configs of models whose images reach the decoder through cross-attention.
REFUSED = (transformers.MllamaConfig, transformers.IdeficsConfig)
