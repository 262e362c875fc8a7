# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ranges of the modalities at one input, and which of them decides for all."""

import math

import torch

from torchao_masquant.evaluation.analysis import ModalityRange
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["modality_ranges"]


def modality_ranges(statistics: InputStatistics) -> dict[str, ModalityRange]:
    """Range and dominance of each modality.

    Args:
        statistics: of one input.

    Returns:
        Modality to range.
    """
    absmax = torch.stack([m.absmax() for m in statistics.moments]).cpu()
    shares = _dominance(absmax)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=absmax.dtype)
    ranges = {}
    for index, modality in enumerate(statistics.modalities):
        low, median, high = absmax[index].quantile(levels).tolist()
        ranges[modality] = ModalityRange(
            tokens=statistics.moments[index].count,
            absmax=absmax[index].max().item(),
            median=median,
            low=low,
            high=high,
            dominance=shares[index],
        )
    return ranges


def _dominance(absmax: torch.Tensor) -> list[float]:
    """Share of the channels, of each row of (M, K), in which it is the largest."""
    largest = absmax.amax(0)
    used = largest > 0
    if not used.any():
        return [math.nan] * absmax.shape[0]
    winners = (absmax == largest)[:, used].double()
    return (winners / winners.sum(0)).mean(1).tolist()
