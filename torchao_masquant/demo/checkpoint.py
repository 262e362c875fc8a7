# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Saving the demonstration's quantized model, and what a reloaded one must answer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.quantization import quantize_
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from torchao_masquant.atomic_files import replacing
from torchao_masquant.config import MASQuantConfig
from torchao_masquant.testing import digits

__all__ = ["LOGITS", "answers", "load", "prompts", "save"]

LOGITS = "logits.safetensors"
_WEIGHTS = "model.pt"
_QUANTIZATION = "quantization.json"
_PROMPTS = 20


def prompts() -> dict[str, dict[str, torch.Tensor]]:
    """A batch of prompts of each task."""
    return {
        task: next(iter(digits.heldout_batches(task, _PROMPTS))).inputs
        for task in digits.TASKS
    }


def answers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Task to the logits (B, T, V) of its :func:`prompts`.

    Without a cache, which would make the graphs of every compiled layer its own.
    """
    return {
        task: model(**inputs, use_cache=False).logits
        for task, inputs in prompts().items()
    }


def save(model: PreTrainedModel, scheme: str, folder: Path) -> int:
    """Write a quantized model and its logits on :func:`prompts`.

    Args:
        model: the quantized thinker.
        scheme: that it was quantized in.
        folder: made where missing.

    Returns:
        Bytes of the weights' file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        logits = answers(model)
    model.config.save_pretrained(folder)
    (folder / _QUANTIZATION).write_text(json.dumps({"scheme": scheme}))
    for name, write in (
        (_WEIGHTS, lambda path: torch.save(model.state_dict(), path)),
        (LOGITS, lambda path: save_file(logits, path)),
    ):
        with replacing(folder / name) as temporary:
            write(temporary)
    return (folder / _WEIGHTS).stat().st_size


def load(folder: Path) -> PreTrainedModel:
    """Read a model that :func:`save` wrote: its integers, never its full precision."""
    config = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
    scheme = json.loads((folder / _QUANTIZATION).read_text())["scheme"]
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    quantize_(model, MASQuantConfig(step="prepare_for_loading", scheme=scheme))
    state = torch.load(folder / _WEIGHTS, weights_only=True)
    model.load_state_dict(state, assign=True)
    return model
