# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One call of a model, for the logits of all its tokens."""

import contextlib
import inspect
from typing import Any, Iterator, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.models.parts import token_reader
from torchao_masquant.models.wrappers import unwrapped
from torchao_masquant.routing import Router
from torchao_masquant.samples import MODALITY_IDS

__all__ = ["evaluation_mode", "logits_of", "modality_ids_of"]


@contextlib.contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the models are as they were after."""
    training = [m for model in models for m in model.modules() if m.training]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def logits_of(
    model: nn.Module, inputs: Mapping[str, Any], router: Optional[Router], where: str
) -> torch.Tensor:
    """Call a model.

    Args:
        inputs: the model's keyword inputs; ``modality_ids`` [batch, sequence] among
            them, which a model does not take itself, go to the router.
        router: that the model's linears read; None where they read none.
        where: what is called with what, for the message.

    Returns:
        Logits (batch, sequence, vocabulary).

    Raises:
        ValueError: what the model returns has no logits of that shape.
    """
    inputs = dict(inputs)
    model = token_reader(model)
    with contextlib.ExitStack() as stack:
        if MODALITY_IDS in inputs and not _takes(model, MODALITY_IDS):
            ids = inputs.pop(MODALITY_IDS)
            if router is not None:
                stack.enter_context(router.explicit(ids))
                _leave_padding_out(router, ids, inputs.get("attention_mask"))
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    elif logits is None:
        logits = output
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        shape = getattr(logits, "shape", None)
        raise ValueError(
            f"{where} gives no logits of shape (batch, sequence, vocabulary), but "
            + (
                f"a {type(logits).__name__}."
                if shape is None
                else f"shape {tuple(shape)}."
            )
        )
    return logits


def _takes(model: nn.Module, name: str) -> bool:
    forward = unwrapped(model).forward
    return name in inspect.signature(forward).parameters


def _leave_padding_out(router: Router, ids: torch.Tensor, mask: Any) -> None:
    """Mark padding among declared ids where the router marks it among its own."""
    if (
        router.skip_padding
        and isinstance(mask, torch.Tensor)
        and mask.shape == ids.shape
    ):
        router.call.ids = ids.long().masked_fill(mask == 0, -2)


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
    mask = inputs.get("attention_mask")
    input_ids = inputs.get("input_ids")
    ids = None
    if isinstance(input_ids, torch.Tensor) and router.token_ids is not None:
        ids = router.ids_of(input_ids, mask)
        if ids is None:
            ids = torch.zeros(shape, dtype=torch.int64)
    elif MODALITY_IDS in inputs:
        with router.explicit(inputs[MODALITY_IDS]):
            ids = router.call.ids
        if ids is None:
            ids = torch.zeros_like(inputs[MODALITY_IDS], dtype=torch.int64)
        if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, -2)
    else:
        ids = torch.zeros(shape, dtype=torch.int64)
        if isinstance(mask, torch.Tensor) and mask.shape == shape:
            ids = ids.to(mask.device).masked_fill(mask == 0, -2)
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"{where} has modality ids of shape {tuple(ids.shape)} for logits of "
            f"{shape[0]} x {shape[1]} tokens."
        )
    return ids
