# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A Qwen2.5-Omni thinker whose text model is SmolLM2, with towers of the digits model."""

from pathlib import Path
from typing import Any, Mapping

import torch
from digits_training.architecture import thinker_config
from safetensors.torch import load_file
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from real.llm import load_llm
from real.prompts import MARKS

__all__ = ["DATA", "build", "load_model", "tower_state"]

DATA = Path(__file__).parent / "data"

_TOWERS = ("model.visual.", "model.audio_tower.")
# Of the text model, as SmolLM2's own configuration says them.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _config(llm: Any) -> Qwen2_5OmniThinkerConfig:
    """The digits model's towers, made to speak to a language model of this width."""
    given = thinker_config().to_dict()
    text = {name: getattr(llm, name) for name in _SAME}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": llm.rope_parameters["rope_theta"],
        # Thirds of the frequencies for time, height and width, as the models of this
        # family have them; the three positions of a text token are the same.
        "mrope_section": [8, 12, 12],
    }
    given["text_config"] = text | {"tie_word_embeddings": True}
    given["tie_word_embeddings"] = True
    given["vision_config"]["out_hidden_size"] = llm.hidden_size
    given["audio_config"]["output_dim"] = llm.hidden_size
    given |= {
        f"{name}_token_index": MARKS[name] for name in ("audio", "image", "video")
    }
    given |= {f"{name}_token_id": token for name, token in MARKS.items()}
    return Qwen2_5OmniThinkerConfig(**given)


def build(layers: int | None = None) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """SmolLM2 with towers that have learned nothing yet, in float32, to evaluate.

    Args:
        layers: only so many of the text model's decoder layers; None for all.

    Raises:
        ModuleNotFoundError: the weights' package is missing.
    """
    llm: Any = load_llm()
    config = _config(llm.config)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    text = model.model.language_model
    kept = text.state_dict().keys()
    state = {n: v for n, v in llm.model.state_dict().items() if n in kept}
    missing, _ = text.load_state_dict(state, strict=False)
    # Qwen's projections have biases, and Llama's have none.
    if any(not name.endswith("_proj.bias") for name in missing):
        raise ValueError(f"SmolLM2 has no tensor for {missing[0]} of the text model.")
    for name in missing:
        text.get_parameter(name).data.zero_()
    model.tie_weights()
    return model.eval()


def tower_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the towers' tensors, by their names in the model."""
    return {n: v for n, v in model.state_dict().items() if n.startswith(_TOWERS)}


def load_model(
    layers: int | None = None,
    towers: Mapping[str, torch.Tensor] | None = None,
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The benchmark's model, in float32, to evaluate.

    Args:
        layers: only so many of the text model's decoder layers; None for all.
        towers: others than the ones that lie beside this file.

    Raises:
        ModuleNotFoundError: the weights' package is missing.
    """
    model = build(layers)
    state = load_file(DATA / "towers.safetensors") if towers is None else towers
    expected = tower_state(model).keys()
    if state.keys() != expected:
        raise ValueError(
            f"these towers are of another architecture: {sorted(state.keys() ^ expected)[0]} "
            "is in one of them alone."
        )
    model.load_state_dict(dict(state), strict=False)
    return model
