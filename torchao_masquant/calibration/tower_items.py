# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which image, or which sound, each token of a tower belongs to.

A large image has a hundred times the patches of a small one, and a padded sound many times
its own frames. What is to suit both counts images and sounds, not patches and frames.
"""

from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Optional

import torch

from torchao_masquant.routing import PADDING

__all__ = ["Items", "items_of"]

# Arguments of a model's call with a row (frames, height, width) or (height, width) for
# each image or video, in patches or pixels.
_SIZES = ("image_grid_thw", "video_grid_thw", "image_sizes", "target_sizes")
# (sounds, frames), or (images, patches): which of them are no padding.
_MASKS = {
    "vision": ("pixel_attention_mask",),
    "audio": ("feature_attention_mask", "input_features_mask", "audio_attention_mask"),
}


@dataclass
class Items:
    """The images, or sounds, whose tokens a linear is called with.

    Attributes:
        count: of them.
        ids: (T,) int64, zero; negative where a token is padding. None: there is none.
        weights: (T,) one over the number of tokens of the token's item.
    """

    count: int
    ids: Optional[torch.Tensor]
    weights: torch.Tensor


def items_of(x: torch.Tensor, modality: str, arguments: Mapping[str, Any]) -> Items:
    """Find them.

    Args:
        x: (items, tokens, K), or (items, rows, columns, K); or (tokens, K), or
            (1, tokens, K), of all items one behind the other, and of one where the
            arguments do not tell how long each is.
        modality: "vision" or "audio".
        arguments: of the model's call.
    """
    rows = x.shape[:-1].numel()
    lead = x.shape[0] if x.dim() > 2 else 1
    if x.dim() > 2 and rows:
        real = _real_tokens(lead, rows // lead, modality, arguments)
        if real is not None:
            return _padded(real, rows // lead)
    if lead > 1:
        return _packed(torch.full((lead,), rows // lead))
    # Images and videos of one call are apart: where both fit, those that are merged less.
    fitting = [
        (int(lengths.sum()), found)
        for lengths in _lengths(modality, arguments)
        if (found := _fitting(lengths, rows, modality)) is not None
    ]
    lengths = min(fitting, key=lambda entry: entry[0], default=(rows, None))[1]
    return _packed(torch.tensor([rows]) if lengths is None else lengths)


def _packed(lengths: torch.Tensor) -> Items:
    lengths = lengths[lengths > 0]
    weights = (1.0 / lengths.double()).repeat_interleave(lengths)
    return Items(len(lengths), None, weights)


def _padded(real: torch.Tensor, length: int) -> Items:
    """Of items of one length, of which some of the first tokens are real."""
    is_real = torch.arange(length) < real[:, None]
    ids = torch.where(is_real, 0, PADDING)
    weights = (1.0 / real.double().clamp_min(1))[:, None].expand_as(ids)
    return Items(int((real > 0).sum()), ids.reshape(-1), weights.reshape(-1))


def _real_tokens(
    items: int, length: int, modality: str, arguments: Mapping[str, Any]
) -> Optional[torch.Tensor]:
    """(items,) of so many tokens; a tower may have made fewer of those of its input."""
    for mask in _given(_MASKS[modality], arguments):
        if mask.dim() == 2 and len(mask) == items and mask.shape[1] >= length:
            shorter = mask.sum(1) * length / mask.shape[1]
            return shorter.ceil().long()
    return None


def _lengths(modality: str, arguments: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """(items,) how long each may be, in units of its own."""
    if modality == "vision":
        for sizes in _given(_SIZES, arguments):
            if sizes.dim() == 2:
                yield sizes.prod(1)
        return
    for mask in _given(_MASKS["audio"], arguments):
        if mask.dim() == 2:
            yield mask.sum(1)


def _given(
    names: tuple[str, ...], arguments: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    for name in names:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            yield value.detach().cpu().long()


def _fitting(lengths: torch.Tensor, rows: int, modality: str) -> Optional[torch.Tensor]:
    """The same in tokens of a tower that makes one of each so many; None: they do not fit."""
    total = int(lengths.sum())
    if rows and total % rows == 0:
        merged = total // rows
        if not (lengths % merged).any():
            return lengths // merged
    if modality != "audio" or not 0 < rows < total:
        return None
    # A convolution of stride 2 makes one frame of a last one by itself, too.
    halved = lengths
    while int(halved.sum()) > rows and (halved > 1).any():
        halved = (halved + 1) // 2
        if int(halved.sum()) == rows:
            return halved
    # Others merge chunks, each by itself, or leave a last one out: to within a token.
    ends = (lengths.cumsum(0) * rows / total).round().long()
    return ends.diff(prepend=ends.new_zeros(1))
