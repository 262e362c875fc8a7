# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tilings of ``int_linear``, and which of them a call may take."""

from typing import Optional

from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.linear_tiles import tiling, within_registers

__all__ = ["CONFIGS", "OWN_EPILOGUE", "fallback", "fitting", "transposed"]

# All of them fit the shared memory of every target: 64 KiB on gfx942, 99 on sm_89.
_DECODE = (
    tiling(4, 4, 16, 64, 256, 4),
    tiling(4, 4, 16, 64, 256, 8),
    tiling(4, 4, 16, 64, 128, 1),
    tiling(4, 4, 16, 128, 128, 4),
)
_SHORT = (
    tiling(4, 3, 64, 64, 128, 4),
    tiling(4, 3, 32, 64, 128, 4),
    tiling(4, 3, 64, 128, 128, 2),
    tiling(4, 3, 64, 128, 128, 1),
)
# Triton 3.7 and 3.9 wait for each product of int8 on Hopper before they start the next:
# two programs of four warps on a multiprocessor keep its tensor cores busier than one.
_LONG = (
    tiling(4, 4, 128, 128, 64),
    tiling(8, 3, 128, 128, 128),
    tiling(8, 3, 128, 256, 64),
    tiling(8, 3, 256, 128, 64),
)
# Where scales of groups and many parts leave no registers for a larger one.
_SMALL = (tiling(4, 3, 64, 64, 128),)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG + _SMALL

# The one for few tokens that does not split K.
OWN_EPILOGUE = _DECODE[2]


def transposed(config: TileConfig, width: int) -> bool:
    """Whether a tile is computed as ``q_w q_x^T``.

    Hopper multiplies at least 64 rows; and a thread holds few rows and many columns of
    a tile, so that scales of groups take less registers as rows.
    """
    return config["BLOCK_M"] < 64 or width > 0


def fitting(
    width: int, parts: int, architecture: Optional[str]
) -> tuple[TileConfig, ...]:
    """Of CONFIGS those that need no more registers than there are.

    Args:
        width: of a group of K, or 0.
        parts: of ``h`` times those of L2.
        architecture: as tables are named, or None.
    """
    # These two keep operands of a product in shared memory, or have registers of their
    # own for its sums.
    roomy = architecture in ("sm_90", "gfx942")
    most = 128 if roomy and not width and parts <= 2 else 64
    known: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG
    if width and parts > 4:
        most, known = 32, known + _SMALL
    if width and architecture == "sm_100":
        # Its sums leave tensor memory for registers, and spilled some.
        known = tuple(c for c in known if c != OWN_EPILOGUE)
    return within_registers(known, most)


def fallback(tokens: int, configs: tuple[TileConfig, ...]) -> TileConfig:
    """By the number of tokens alone."""
    if tokens <= 16:
        return _DECODE[0]
    if tokens <= 64:
        return _SHORT[0]
    if tokens <= 256:
        return _SHORT[3]
    return next(c for c in _LONG + _SMALL if c in configs)
