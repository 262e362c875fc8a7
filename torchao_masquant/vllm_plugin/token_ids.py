# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Modality ids of the tokens of a step, where every quantized layer finds them.

vLLM runs the tokens of many requests as one row, and its layers are not told what they
are. But before each step it asks the model to embed them, and says which of them stand
for images or sounds. There the ids are written, to a buffer that stays where it is, since
compiled and captured graphs have its address.
"""

from functools import wraps
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

from torchao_masquant.modality import TEXT

__all__ = ["TokenIds", "watch_embedding"]


class TokenIds:
    """Modality ids of the tokens of the step that runs.

    Args:
        size: tokens that a step may have.
        modalities: names that the ids index, base first; "text" is one of them.
        placeholders: name of each to the token ids that stand for it.
        device: of the model.

    Attributes:
        ids: (size,) int32; behind the tokens of the step those of text.
    """

    def __init__(
        self,
        size: int,
        modalities: Sequence[str],
        placeholders: Mapping[str, Sequence[int]],
        device: torch.device,
    ):
        self._text = modalities.index(TEXT)
        self.ids = torch.full((size,), self._text, dtype=torch.int32, device=device)
        self._filled = 0
        largest = max((t for known in placeholders.values() for t in known), default=0)
        # One more than there are: what is larger is looked up there.
        self._table = torch.full((largest + 2,), self._text, dtype=torch.int32)
        for index, name in enumerate(modalities):
            self._table[list(placeholders[name])] = index
        self._table = self._table.to(device)

    def hold_in(self, layer: nn.Module) -> None:
        """Be what a layer reads, and be kept with its model.

        Of what lies on a device, vLLM's sleep (level 2) keeps a model's buffers alone.
        """
        layer.masquant_token_ids = self  # type: ignore[assignment]
        layer.register_buffer("masquant_ids", self.ids, persistent=False)
        layer.register_buffer("masquant_modalities", self._table, persistent=False)

    def fill(
        self, input_ids: torch.Tensor, is_multimodal: Optional[torch.Tensor]
    ) -> None:
        """Take the ids of a step.

        Args:
            input_ids: (T,) token ids, prompts' placeholders among them.
            is_multimodal: (T,) bool, which of them towers make; None: none of them.
        """
        count = input_ids.shape[0]
        if is_multimodal is not None and is_multimodal.device.type == "cpu":
            # No work, and no waiting for a device, for a step that only decodes.
            is_multimodal = is_multimodal if bool(is_multimodal.any()) else None
        if is_multimodal is None:
            self.ids[: self._filled] = self._text
            self._filled = 0
            return
        last = self._table.shape[0] - 1
        ids = self._table[input_ids.clamp(0, last).long()]
        self.ids[:count] = ids.where(is_multimodal.to(ids.device), self._text)
        self.ids[count : self._filled] = self._text
        self._filled = count


def watch_embedding(model_class: type[nn.Module]) -> None:
    """Let the models of a class fill the ids of their quantized layers.

    Args:
        model_class: of vLLM, that embeds tokens of several modalities.

    Raises:
        TypeError: it does not, as vLLM's multimodal models do.
    """
    embed = getattr(model_class, "embed_input_ids", None)
    if embed is None:
        raise TypeError(
            f"{model_class.__name__} does not embed tokens as vLLM's multimodal models do "
            "(embed_input_ids), so that modalities cannot be told: serve a checkpoint "
            "that was calibrated with modalities=('text',)."
        )
    if getattr(embed, "_fills_token_ids", False):
        return

    @wraps(embed)
    def embed_input_ids(
        self: nn.Module,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Optional[torch.Tensor] = None,
        **others: Any,
    ) -> torch.Tensor:
        token_ids = _token_ids_of(self)
        if token_ids is not None:
            token_ids.fill(input_ids, is_multimodal)
        if is_multimodal is not None:
            others["is_multimodal"] = is_multimodal
        return embed(self, input_ids, multimodal_embeddings, **others)

    embed_input_ids._fills_token_ids = True  # type: ignore[attr-defined]
    model_class.embed_input_ids = embed_input_ids  # type: ignore[attr-defined]


def _token_ids_of(model: nn.Module) -> Optional[TokenIds]:
    """That which the quantized layers of a model read; None where it has none."""
    known: Mapping[str, Any] = model.__dict__
    if "_masquant_token_ids" not in known:
        found = (getattr(m, "masquant_token_ids", None) for m in model.modules())
        # Not by setattr of nn.Module, which looks for parameters.
        model.__dict__["_masquant_token_ids"] = next(
            (ids for ids in found if ids is not None), None
        )
    return known["_masquant_token_ids"]
