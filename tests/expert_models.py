# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Experts of transformers' own classes, one for each layout, in a small model."""

from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextExperts,
)

try:
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
except ModuleNotFoundError:
    # Before transformers 5.20 no experts have a norm behind them.
    MuseSparkExperts = None

E, H, INNER, TOP_K = 4, 32, 24, 2
NAMES = ("text", "vision", "audio")

# Gated as most are; transposed, with biases and a gate of its own; without a gate; with a
# norm behind.
LAYOUTS = {
    "gated": Qwen3VLMoeTextExperts,
    "transposed": GptOssExperts,
    "not gated": NemotronHExperts,
} | ({} if MuseSparkExperts is None else {"normed": MuseSparkExperts})

_CONFIG = {
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "hidden_size": H,
    "moe_hidden_size": H,
    "moe_latent_size": None,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}


class MoEModel(nn.Module):
    """A linear, and experts: only token_modalities says what its tokens are."""

    def __init__(self, layout: str = "gated", seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(H, H)
        self.experts = LAYOUTS[layout](SimpleNamespace(**_CONFIG))
        self.gate = nn.Parameter(torch.empty(E, H))
        for name, parameter in self.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            elif parameter.dim() > 1 and not name.endswith("bias"):
                values = values * H**-0.5
            parameter.data = values
        self.eval()

    def choices(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, k) experts of each token, and what they weigh."""
        scores = (x @ self.gate.t()).softmax(-1)
        weights, chosen = scores.topk(TOP_K, dim=-1)
        return chosen, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)).reshape(-1, H)
        y = self.experts(hidden, *self.choices(hidden))
        return y.reshape(*x.shape[:-1], H)


def sample(
    seed: int = 0, tokens: int = 60, ids: Optional[torch.Tensor] = None
) -> dict[str, Any]:
    """Tokens of all modalities, of different ranges channel by channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, H, generator=generator)
    if ids is None:
        ids = torch.randint(0, 3, (1, tokens), generator=generator)
    ranges = torch.randn(3, H, generator=torch.Generator().manual_seed(99)).exp()
    return {"x": x * ranges[ids.clamp_min(0)], "modality_ids": ids}


def samples(count: int = 6) -> list[dict[str, Any]]:
    return [sample(seed) for seed in range(count)]
