# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Running calibration data through a model."""

import contextlib
import inspect
from typing import Any, Iterable, Iterator, Mapping

import torch
from torch import nn

from torchao_masquant.models.parts import token_reader
from torchao_masquant.progress import progress_bar
from torchao_masquant.routing import PADDING, Router
from torchao_masquant.sample_checks import check_sample, check_samples

__all__ = ["MODALITY_IDS", "run_samples"]

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
    takes_ids = MODALITY_IDS in inspect.signature(reader.forward).parameters
    count = 0
    bar = progress_bar(samples, desc=description, show=progress)
    with torch.no_grad(), _evaluation_mode(model):
        for count, sample in enumerate(bar, start=1):
            check_sample(sample, f"sample {count - 1}", model)
            inputs = dict(sample)
            if MODALITY_IDS in inputs and not takes_ids:
                ids = inputs.pop(MODALITY_IDS)
                with router.explicit(ids):
                    _leave_padding_out(router, ids, inputs.get("attention_mask"))
                    reader(**inputs)
            else:
                reader(**inputs)
    return count


def _leave_padding_out(router: Router, ids: torch.Tensor, mask: Any) -> None:
    """Mark the padding among declared ids, as the router does among its own."""
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        router.call.ids = ids.long().masked_fill(mask == 0, PADDING)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
