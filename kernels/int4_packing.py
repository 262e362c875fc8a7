# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Two signed 4-bit integers per byte, packed along the last dimension."""

import torch


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack signed 4-bit integers, two per byte.

    Element ``2 * j`` is the low nibble of byte ``j``, element ``2 * j + 1`` the
    high one. An odd last dimension is padded with one zero nibble.

    Args:
        values: (..., K) int8, every value in [-8, 7].

    Returns:
        (..., ceil(K / 2)) uint8.

    Raises:
        TypeError: ``values`` is not int8.
    """
    if values.dtype != torch.int8:
        raise TypeError(f"pack_int4 takes int8 values, got {values.dtype}.")
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    nibbles = values.to(torch.uint8) & 0xF
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: (..., ceil(K / 2)) uint8.
        in_features: K, the number of values along the last dimension.

    Returns:
        (..., K) int8, sign-extended.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: ``in_features`` does not fit the packed width.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_int4 takes uint8 bytes, got {packed.dtype}.")
    if (in_features + 1) // 2 != packed.shape[-1]:
        raise ValueError(
            f"unpack_int4: {packed.shape[-1]} bytes a row cannot hold "
            f"{in_features} 4-bit values."
        )
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    # (v ^ 8) - 8 sign-extends a nibble: 0..7 stay, 8..15 become -8..-1.
    values = (nibbles.to(torch.int8) ^ 8) - 8
    return values[..., :in_features]
