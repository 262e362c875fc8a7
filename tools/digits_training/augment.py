# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Random changes to the bytes of training examples, so that few of them suffice."""

import torch
from torch import Tensor

from torchao_masquant.testing.digits.examples import TaskExamples

SHIFTED_IMAGES = 0.3  # fraction, along each axis
MAX_IMAGE_SHIFT = 1  # pixels
MAX_DELAY = 14  # frames of 16 ms
MAX_MEL_SHIFT = 1  # bins
MASKED_FRAMES = 6
NOISE = 8.0  # standard deviation, of 255


def _shift(rows: Tensor, offsets: Tensor, dim: int) -> Tensor:
    """Move each row by its own offset along ``dim``, filling with zeros.

    Args:
        rows: uint8 [n, height, width].
        offsets: int64 [n]; positive moves to larger indices.
        dim: 1 or 2.
    """
    size = rows.shape[dim]
    source = torch.arange(size)[None, :] - offsets[:, None]
    inside = (source >= 0) & (source < size)
    shape = (-1, size, 1) if dim == 1 else (-1, 1, size)
    index = source.clamp(0, size - 1).view(shape).expand_as(rows)
    return rows.gather(dim, index) * inside.view(shape)


def _integers(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count] in low..high, both included."""
    return torch.randint(low, high + 1, (count,), generator=generator)


def _augment_images(images: Tensor, generator: torch.Generator) -> Tensor:
    for dim in (1, 2):
        limit = MAX_IMAGE_SHIFT
        offsets = _integers(-limit, limit, len(images), generator)
        chosen = torch.rand(len(images), generator=generator) < SHIFTED_IMAGES
        images = _shift(images, offsets * chosen, dim)
    return images


def _augment_log_mels(log_mels: Tensor, generator: torch.Generator) -> Tensor:
    count, _, frames = log_mels.shape
    log_mels = _shift(log_mels, _integers(0, MAX_DELAY, count, generator), 2)
    bins = _integers(-MAX_MEL_SHIFT, MAX_MEL_SHIFT, count, generator)
    log_mels = _shift(log_mels, bins, 1)
    start = _integers(0, frames - 1, count, generator)[:, None]
    position = torch.arange(frames)[None, :]
    masked = (position >= start) & (position < start + MASKED_FRAMES)
    noise = torch.randn(log_mels.shape, generator=generator) * NOISE
    noisy = log_mels.float() * ~masked[:, None, :] + noise
    return noisy.round().clamp(0, 255).to(torch.uint8)


def augment(examples: TaskExamples, generator: torch.Generator) -> TaskExamples:
    """Shifted images; delayed, transposed, masked and noisy spectrograms."""
    images, log_mels = examples.images, examples.log_mels
    return TaskExamples(
        examples.prompt_ids,
        examples.answer_ids,
        None if images is None else _augment_images(images, generator),
        None if log_mels is None else _augment_log_mels(log_mels, generator),
    )
