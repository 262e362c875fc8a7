# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Running calibration data through a model."""

import contextlib
import inspect
from typing import Any, Iterable, Iterator, Mapping, Optional

import torch
from torch import nn

from torchao_masquant.models.parts import token_reader
from torchao_masquant.models.wrappers import unwrapped
from torchao_masquant.progress import progress_bar
from torchao_masquant.routing import PADDING, Router
from torchao_masquant.sample_checks import check_sample, check_samples

__all__ = ["MODALITY_IDS", "call_on_sample", "evaluation_mode", "run_samples"]

#: Key of a sample under which it may carry its tokens' modality ids.
MODALITY_IDS = "modality_ids"


def run_samples(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    router: Router,
    *,
    progress: bool,
    description: str,
) -> int:
    """Call the model, or its part that reads tokens, with each sample, without gradients, in evaluation mode.

    Args:
        samples: keyword inputs of the model. A sample may also hold ``modality_ids``
            [batch, sequence], where ``input_ids`` do not tell the modalities.
        router: the one that the modality ids are meant for.
        progress: show a bar on a terminal.
        description: of the bar.

    Returns:
        How many samples there were.

    Raises:
        TypeError: a sample is no dict of a model's inputs.
        ValueError: a sample's tensor is of a shape that ids cannot have, or not on the
            model's device.
    """
    check_samples(samples)
    reader = token_reader(model)
    count = 0
    bar = progress_bar(samples, desc=description, show=progress)
    with evaluation_mode(model):
        for count, sample in enumerate(bar, start=1):
            check_sample(sample, f"sample {count - 1}", model)
            call_on_sample(reader, sample, router)
    return count


def call_on_sample(
    reader: nn.Module, sample: Mapping[str, Any], router: Optional[Router]
) -> Any:
    """Call the part of a model that reads tokens with one sample; what it returns.

    Args:
        reader: from :func:`~torchao_masquant.models.parts.token_reader`.
        sample: its keyword inputs. ``modality_ids`` among them, where it does not take
            these itself, are told to the router.
        router: that the model's linears read; None where they read none.
    """
    inputs = dict(sample)
    taken = inspect.signature(unwrapped(reader).forward).parameters
    if MODALITY_IDS not in inputs or MODALITY_IDS in taken:
        return reader(**inputs)
    ids = inputs.pop(MODALITY_IDS)
    if router is None:
        return reader(**inputs)
    with router.explicit(ids):
        mask = inputs.get("attention_mask")
        is_mask = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
        if router.skip_padding and is_mask:
            # As the router marks padding among ids of its own.
            router.call.ids = ids.long().masked_fill(mask == 0, PADDING)
        return reader(**inputs)


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
