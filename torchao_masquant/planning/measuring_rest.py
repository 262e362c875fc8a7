# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measures what a decoder does beside its linears, on one that has none."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from torchao_masquant.planning.least_squares import non_negative_fit
from torchao_masquant.planning.machine import RestRates
from torchao_masquant.planning.processor_time import processor_seconds

__all__ = ["rest_rates"]

_HEAD, _ELEMENT = 64, 2
#: layers, hidden width, heads of keys, tokens of a call, tokens in the cache
_CALLS = (
    (1, 256, 2, 1, 0),
    (4, 256, 2, 1, 0),
    (2, 512, 8, 1, 512),
    (4, 512, 2, 1, 1024),
    (2, 1024, 4, 1, 2048),
    (2, 1024, 16, 1, 1024),
    (4, 768, 2, 1, 384),
    (1, 256, 2, 64, 0),
    (4, 256, 2, 256, 0),
    (2, 768, 6, 128, 0),
    (2, 512, 2, 512, 0),
    (1, 768, 6, 1024, 0),
)


class _NoLinear(nn.Module):
    """Zeros of the right shape, made before."""

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs
        self.zeros: dict[torch.Size, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[:-1]
        if shape not in self.zeros:
            self.zeros[shape] = x.new_zeros(*shape, self.outputs)
        return self.zeros[shape]


def rest_rates() -> RestRates:
    """Of decoders of Qwen2.5-VL in bfloat16, of several sizes."""
    features, seconds = [], []
    # Weights that are read between two layers leave nothing else in a cache.
    weights = torch.zeros(64 << 20, dtype=torch.uint8)
    for layers, hidden, width, tokens, cached in _CALLS:
        model, values = _without_linears(layers, hidden, width)
        x = torch.randn(1, tokens, hidden).bfloat16()
        past = torch.randn(1, width, cached, _HEAD).bfloat16()
        cache = DynamicCache(config=model.config)
        for layer in range(layers if cached else 0):
            cache.update(past, past, layer)
        call = partial(_call, model, x, cache)
        keys = cached + (tokens + 1) / 2
        features.append(
            (
                1,
                layers,
                tokens * values,
                2 * layers * tokens * keys * hidden,
                2 * layers * width * _HEAD * _ELEMENT * (cached + tokens),
                2 * layers * hidden * (cached + tokens),
            )
        )
        seconds.append(processor_seconds(call, 0.1, before=lambda: weights.add_(1)))
    return RestRates(*non_negative_fit(features, seconds))


def _call(model: Any, x: torch.Tensor, cache: DynamicCache) -> None:
    model(inputs_embeds=x, past_key_values=cache, use_cache=True)
    # Views of what was there before: nothing is copied.
    cache.crop(-x.shape[1])


def _without_linears(layers: int, hidden: int, width: int) -> tuple[Any, int]:
    """A decoder, and the values in and out of its linears for a token."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // _HEAD,
            "num_key_value_heads": width,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
    ).get_text_config()
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLTextModel(config).bfloat16().eval()
    values = 0
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            values += linear.in_features + linear.out_features
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _NoLinear(linear.out_features))
    return model, values
