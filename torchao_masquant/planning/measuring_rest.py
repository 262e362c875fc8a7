# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Measures what a decoder does beside its linears, on one that has none."""

import itertools
import statistics
import time
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from torchao_masquant.planning.least_squares import non_negative_fit
from torchao_masquant.planning.machine import RestRates

__all__ = ["rest_rates"]

_HEAD, _ELEMENT = 64, 2
_REPEATS = 15

# Of a linear: 2 MiB.
_READ_VALUES = 1 << 19
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


class _Weights:
    """What linears would have read meanwhile, and the seconds that it took."""

    def __init__(self) -> None:
        self.parts = itertools.cycle(torch.zeros(1 << 24).split(_READ_VALUES))
        self.seconds = 0.0

    def read(self) -> None:
        """Some of them, so that no cache holds what was there before."""
        started = time.process_time()
        next(self.parts).sum()
        self.seconds += time.process_time() - started


class _NoLinear(nn.Module):
    """Zeros of the right shape, made before, while the clock stands still."""

    def __init__(self, outputs: int, weights: _Weights):
        super().__init__()
        self.outputs, self.weights = outputs, weights
        self.zeros: dict[torch.Size, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weights.read()
        shape = x.shape[:-1]
        if shape not in self.zeros:
            self.zeros[shape] = x.new_zeros(*shape, self.outputs)
        return self.zeros[shape]


def rest_rates() -> RestRates:
    """Of models of Qwen2.5-VL in bfloat16, of several sizes."""
    features, seconds = [], []
    weights = _Weights()
    for layers, hidden, width, tokens, cached in _CALLS:
        model, values = _without_linears(layers, hidden, width, weights)
        x = torch.randn(1, tokens, hidden).bfloat16()
        past = torch.randn(1, width, cached, _HEAD).bfloat16()
        cache = DynamicCache(config=model.config.get_text_config())
        for layer in range(layers if cached else 0):
            cache.update(past, past, layer)
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
        seconds.append(_median_seconds(model, x, cache, weights))
    return RestRates(*non_negative_fit(features, seconds))


def _median_seconds(
    model: Any, x: torch.Tensor, cache: DynamicCache, weights: _Weights
) -> float:
    """Of a call, over some, after two to warm up."""
    found = []
    for _ in range(2 + _REPEATS):
        weights.seconds, started = 0.0, time.process_time()
        model(inputs_embeds=x, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(time.process_time() - started - weights.seconds)
        # Views of what was there before: nothing is copied.
        cache.crop(-x.shape[1])
    return statistics.median(found[2:])


def _without_linears(
    layers: int, hidden: int, width: int, weights: _Weights
) -> tuple[Any, int]:
    """A model, and the values in and out of its decoder's linears for a token."""
    config = Qwen2_5_VLConfig(
        vision_config={"depth": 0, "hidden_size": 64, "out_hidden_size": hidden},
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
        },
    )
    model = Qwen2_5_VLForConditionalGeneration(config).bfloat16().eval()
    values = 0
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "visual" not in name:
            parent, _, last = name.rpartition(".")
            stand_in = _NoLinear(linear.out_features, weights)
            setattr(model.get_submodule(parent), last, stand_in)
            if last != "lm_head":
                values += linear.in_features + linear.out_features
    return model, values
