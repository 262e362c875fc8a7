# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ratios of energies, in dB."""

import math

__all__ = ["decibel"]


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies.

    Returns:
        inf without noise, -inf without signal, nan without either.
    """
    if signal <= 0:
        return -math.inf if noise > 0 else math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
