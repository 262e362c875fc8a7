# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tilings of ``weight_only_linear``, and which of them a call may take."""

import torch

from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.linear_tiles import (
    tiling,
    with_block_k,
    within_registers,
)

__all__ = ["CONFIGS", "fallback", "fitted", "fitting", "smoothed_here"]

_DECODE = (
    tiling(8, 4, 16, 64, 128, 4),
    tiling(8, 4, 16, 64, 128, 8),
    tiling(4, 4, 16, 128, 64, 4),
    tiling(8, 4, 16, 64, 128, 1),
)
_SHORT = (
    tiling(4, 3, 32, 64, 128, 4),
    tiling(4, 3, 64, 64, 64, 2),
)
_LONG = (
    tiling(4, 3, 64, 128, 64),
    tiling(8, 4, 128, 128, 32),
    # For float16 and float32, whose parts leave no registers for larger ones.
    tiling(8, 3, 64, 128, 64),
    tiling(8, 3, 64, 64, 64),
)
CONFIGS: tuple[TileConfig, ...] = _DECODE + _SHORT + _LONG


def fitting(dtype: torch.dtype) -> tuple[TileConfig, ...]:
    """Of CONFIGS those that need no more registers than there are."""
    most = {torch.float32: 16, torch.float16: 32}.get(dtype, 64)
    return within_registers(CONFIGS, most)


def fallback(tokens: int, configs: tuple[TileConfig, ...]) -> TileConfig:
    """By the number of tokens alone."""
    if tokens <= 16:
        return _DECODE[0]
    if tokens <= 64:
        return _SHORT[0]
    preferred = (*_SHORT[1:], *_LONG[2:]) if tokens <= 256 else _LONG[1:]
    return next(config for config in preferred if config in configs)


def fitted(config: TileConfig, width: int, wide: bool) -> TileConfig:
    """A tiling for groups of this width, or 0; and for float32 tokens, if wide."""
    # Elements of four bytes, and their parts: half as many in a block fit.
    return with_block_k(config, config["BLOCK_K"] // (2 if wide else 1), width)


def smoothed_here(config: TileConfig, paired: bool) -> bool:
    """Whether tokens are smoothed where the product reads them."""
    return config["BLOCK_M"] <= 16 and not paired
