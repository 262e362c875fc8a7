# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The decoder of a transformers model as functions of tensors alone."""

import inspect
from typing import Any, Optional, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from torchao_masquant.routing import router_of, token_modalities

__all__ = ["Decode", "Embed", "Prefill", "cache_keyword"]


def cache_keyword(model: PreTrainedModel) -> str:
    """What a model calls its keys and values, which depends on transformers' age."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class _Slots(StaticLayer):
    """A layer's keys and values in tensors of the caller's, written in place."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, cache_position: torch.Tensor
    ):
        super().__init__(keys.shape[2])
        self.keys, self.values = keys, values
        self.cache_position = cache_position
        self.device = keys.device
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.cache_position, key_states)
        self.values.index_copy_(2, self.cache_position, value_states)
        return self.keys, self.values


def _masks(config: Any, slots: int, position: torch.Tensor, dtype: torch.dtype) -> Any:
    """What each kind of layer attends to: (1, 1, T, S), or a dict of them by kind."""
    slot = torch.arange(slots, device=position.device)
    causal = slot[None] <= position[:, None]
    window: Any = getattr(config, "sliding_window", None)

    def shaped(allowed: torch.Tensor) -> torch.Tensor:
        if config._attn_implementation == "eager":
            blocked = torch.finfo(dtype).min
            return torch.where(allowed, 0.0, blocked).to(dtype)[None, None]
        return allowed[None, None]

    def sliding() -> torch.Tensor:
        return shaped(causal & (slot[None] > position[:, None] - window))

    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return shaped(causal) if window is None else sliding()
    makers = {
        "full_attention": lambda: shaped(causal),
        "sliding_attention": sliding,
    }
    return {kind: makers[kind]() for kind in sorted(set(kinds))}


class Prefill(nn.Module):
    """Logits of a prompt's last token; the prompt's keys and values go to the cache.

    Args:
        model: a transformers model whose decoder is quantized, or not.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._last_only = (
            "logits_to_keep" in inspect.signature(model.forward).parameters
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        modality_ids: Optional[torch.Tensor],
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            inputs_embeds: (B, T, H).
            modality_ids: (B, T) integers that index the modalities, base first, or
                None: all base.
            position_ids: (3, B, T) or (B, T), as the model's rotary embedding has it.
            cache_position: (T,) the slots that the tokens take.
            keys: of each layer, (B, heads, S, width).
            values: the same.

        Returns:
            (B, 1, V).
        """
        config = self.model.config.get_text_config()
        layers = [_Slots(k, v, cache_position) for k, v in zip(keys, values)]
        options: dict[str, Any] = {cache_keyword(self.model): Cache(layers=layers)}
        if self._last_only:
            options["logits_to_keep"] = 1
        call = dict(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=_masks(
                config, keys[0].shape[2], cache_position, inputs_embeds.dtype
            ),
            use_cache=True,
            **options,
        )
        if router_of(self.model) is None:
            logits = self.model(**call).logits
        else:
            with token_modalities(self.model, modality_ids):
                logits = self.model(**call).logits
        return logits[:, -1:]


class Decode(Prefill):
    """Logits after one token of the base modality."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            input_ids: (B, 1) token ids.

        All else, and the result, are as in :class:`Prefill`.
        """
        embeds = self.model.get_input_embeddings()(input_ids)
        return super().forward(embeds, None, position_ids, cache_position, keys, values)


class Embed(nn.Module):
    """The embeddings of token ids: (B, T) to (B, T, H)."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(input_ids)
