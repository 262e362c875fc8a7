# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One call of a model: the logits of all its tokens, and their modalities."""

from typing import Any, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.models.parts import token_reader
from torchao_masquant.routing import PADDING, Router
from torchao_masquant.samples import MODALITY_IDS, call_on_sample

__all__ = ["logits_of", "modality_ids_of"]


def logits_of(
    model: nn.Module, inputs: Mapping[str, Any], router: Optional[Router], where: str
) -> torch.Tensor:
    """Call a model.

    Args:
        inputs: as :func:`~torchao_masquant.samples.call_on_sample` takes them.
        router: that the model's linears read; None where they read none.
        where: what is called with what, for the message.

    Returns:
        Logits (batch, sequence, vocabulary).

    Raises:
        ValueError: what the model returns has no logits of that shape.
    """
    output = call_on_sample(token_reader(model), inputs, router)
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    elif logits is None:
        logits = output
    if isinstance(logits, torch.Tensor) and logits.dim() == 3:
        return logits
    shape = getattr(logits, "shape", None)
    found = f"a {type(logits).__name__}" if shape is None else f"shape {tuple(shape)}"
    raise ValueError(
        f"{where} gives no logits of shape (batch, sequence, vocabulary), but {found}."
    )


def modality_ids_of(
    router: Router, inputs: Mapping[str, Any], shape: tuple[int, int], where: str
) -> torch.Tensor:
    """The modality of each token of a call.

    Args:
        router: leaves padding out; it need not be attached to a model.
        inputs: of the call, as for :func:`logits_of`.
        shape: (batch, sequence).
        where: for the message.

    Returns:
        (batch, sequence) int64 that indexes the router's modalities, negative for
        padding, on the device of the inputs.

    Raises:
        ValueError: the ids are of another shape or out of range, or a token is of a
            modality that the router does not know.
    """
    mask, input_ids = inputs.get("attention_mask"), inputs.get("input_ids")
    ids = None
    if isinstance(input_ids, torch.Tensor) and router.token_ids is not None:
        ids = router.ids_of(input_ids, mask)
    elif MODALITY_IDS in inputs:
        with router.explicit(inputs[MODALITY_IDS]):
            ids = router.call.ids
        if ids is None:
            ids = torch.zeros_like(inputs[MODALITY_IDS], dtype=torch.int64)
    if ids is None:
        # All tokens are of the base modality.
        ids = torch.zeros(shape, dtype=torch.int64)
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids.to(mask.device).masked_fill(mask == 0, PADDING)
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"{where} has modality ids of shape {tuple(ids.shape)} for logits of "
            f"{shape[0]} x {shape[1]} tokens."
        )
    return ids
