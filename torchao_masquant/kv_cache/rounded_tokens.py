# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Keys or values in 8 or 4 bits: a step and an offset for each token of a head."""

import functools
from typing import NamedTuple

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.int4_packing import pack_int4, unpack_int4

__all__ = ["RoundedTokens", "check_bits", "rotation", "round_tokens"]

_BITS = (8, 4)


def check_bits(bits: int) -> None:
    """Raise ``ValueError`` unless a cache may have so many bits."""
    if type(bits) is not int or bits not in _BITS:
        raise ValueError(f"a cache has 8 or 4 bits, got {bits!r}.")


@functools.cache
def rotation(width: int, device: torch.device) -> torch.Tensor:
    """(D, D) float32, which blocks of a power of two of a head's channels are rotated by.

    One product with it takes a part of the time that its stages take one by one.
    """
    with torch.inference_mode(False):
        return hadamard_rotate(torch.eye(width, device=device), width & -width)


class RoundedTokens(NamedTuple):
    """Tokens of heads, rounded.

    Attributes:
        codes: (B, H, S, D) int8, or (B, H, S, ceil(D / 2)) uint8 of 4 bits.
        scale: (B, H, S, 1) bfloat16.
        low: (B, H, S, 1) bfloat16, what a code of the smallest integer stands for.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor

    def values(self, width: int) -> torch.Tensor:
        """What they stand for, (B, H, S, D) float32, D being ``width``."""
        codes, half = self.codes, 128
        if codes.dtype == torch.uint8:
            codes, half = unpack_int4(codes, width), 8
        rotated = (codes.float() + half) * self.scale.float() + self.low.float()
        return rotated @ rotation(width, rotated.device)


def round_tokens(values: torch.Tensor, bits: int) -> RoundedTokens:
    """Round the channels of each token of a head, rotated, between the least and the most.

    Steps and offsets are rounded first, so that codes are those of what is held. No channel
    is off by more than half a step, rotated, and by what float32 adds.

    Args:
        values: (B, H, S, D) floating point.
        bits: 8 or 4.
    """
    values = values.float() @ rotation(values.shape[-1], values.device)
    low = _bfloat16(values.amin(-1, keepdim=True), below=True)
    most = 2**bits - 1
    span = values.amax(-1, keepdim=True) - low.float()
    # Of a token whose channels are all alike, whatever step there is.
    scale = (span / most).clamp_min(torch.finfo(torch.float32).tiny)
    scale = _bfloat16(scale, below=False)
    codes = ((values - low.float()) / scale.float()).round().clamp(0, most)
    held = (codes - (most + 1) // 2).to(torch.int8)
    return RoundedTokens(pack_int4(held) if bits == 4 else held, scale, low)


def _bfloat16(values: torch.Tensor, *, below: bool) -> torch.Tensor:
    """Rounded to one side, so that no value is outside of what codes reach."""
    nearest = values.bfloat16()
    wrong = nearest.float() > values if below else nearest.float() < values
    end = torch.full_like(nearest, -torch.inf if below else torch.inf)
    return torch.where(wrong, torch.nextafter(nearest, end), nearest)
