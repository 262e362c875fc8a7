# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tilings of ``float_linear``, and which of them a call may take."""

from typing import Optional

from torchao_masquant.kernels.float_instructions import Product
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.linear_tiles import tiling, with_block_k

__all__ = ["CONFIGS", "fallback", "fitted", "fitting", "transposed"]

# Blackwell multiplies with scales of groups where one side of a tile has 128 rows.
_DECODE = (
    tiling(4, 4, 16, 128, 128, 8),
    tiling(4, 4, 16, 128, 128, 1),
)
_SHORT = (tiling(4, 3, 64, 128, 128, 2),)
_LONG = (tiling(8, 3, 128, 128, 128),)
# Where sums of a block are multiplied by scales, which leaves no registers for larger ones.
_SMALL = (
    tiling(4, 3, 64, 64, 128, 2),
    tiling(8, 3, 64, 64, 128),
    tiling(8, 3, 64, 128, 128),
)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG + _SMALL


def transposed(config: TileConfig, width: int) -> bool:
    """Whether a tile is computed as ``q_w q_x^T``: see ``int_linear_tilings``."""
    return config["BLOCK_M"] < 128 or width > 0


def fitting(width: int, architecture: Optional[str]) -> tuple[TileConfig, ...]:
    """Of CONFIGS those that a call may take.

    Args:
        width: of what shares float32 scales, or 0.
        architecture: as tables are named, or None.
    """
    if not width:
        return _DECODE + _SHORT + _LONG
    # Its sums leave tensor memory for registers, and spilled some.
    blackwell = architecture is not None and architecture.startswith(("sm_10", "sm_11"))
    return _DECODE + (_SMALL[:2] if blackwell else _SMALL)


def fallback(tokens: int, configs: tuple[TileConfig, ...]) -> TileConfig:
    """By the number of tokens alone, of what :func:`fitting` gives."""
    if tokens <= 16:
        return _DECODE[0]
    return configs[len(_DECODE)] if tokens <= 256 else configs[-1]


def fitted(config: TileConfig, product: Product, width: int) -> TileConfig:
    """A tiling whose blocks of K fit groups, and shared memory."""
    wanted = config["BLOCK_K"]
    if product in (Product.DECODED, Product.FNUZ):
        # Of bfloat16 half as many take the same room, and codes that go through registers
        # take those.
        wanted = max(wanted // 2, 32)
    return with_block_k(config, wanted, width)
