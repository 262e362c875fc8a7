# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""All that an analysis says of one input and of the linears that read it."""

import math
from dataclasses import dataclass
from typing import Sequence

import torch

from torchao_masquant.evaluation.analysis import (
    InputAnalysis,
    ModalityRange,
    SmoothingLoss,
)
from torchao_masquant.evaluation.compensation_curves import (
    CompensationCurve,
    compensation_curves,
    shared_weight,
)
from torchao_masquant.evaluation.smoothing_loss import smoothing_loss
from torchao_masquant.evaluation.token_session import TokenSession
from torchao_masquant.options import Scheme
from torchao_masquant.solver.modality_spread import input_spread
from torchao_masquant.solver.smoothing import smoothing_factor
from torchao_masquant.statistics.input_statistics import InputStatistics

__all__ = ["InputStudy", "study_input"]


@dataclass(frozen=True)
class InputStudy:
    """Of one input.

    Attributes:
        input: ranges, losses and spread.
        curves: modality (all but the base) to linear to its curves.
    """

    input: InputAnalysis
    curves: dict[str, dict[str, CompensationCurve]]


@torch.inference_mode(False)
@torch.no_grad()
def study_input(
    session: TokenSession,
    leader: str,
    names: Sequence[str],
    scheme: Scheme,
    alpha: float,
    ranks: Sequence[float],
) -> InputStudy:
    """Study one input.

    Args:
        session: has seen its data.
        leader: the first linear that reads the input.
        names: all linears that do.
        scheme: integer formats.
        alpha: exponent of the activations in the smoothing factors.
        ranks: shares of ``min(N, K)``.
    """
    statistics = session.statistics[leader]
    weights = {name: session.linears[name].weight.detach() for name in names}
    weight_absmax = torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)
    ranges = [moments.absmax() for moments in statistics.moments]
    own = [smoothing_factor(absmax, weight_absmax, alpha) for absmax in ranges]
    unified = smoothing_factor(torch.stack(ranges).amax(0), weight_absmax, alpha)

    losses: dict[str, SmoothingLoss] = {}
    if not scheme.weight_only:
        losses = {
            modality: smoothing_loss(
                session.tokens(leader, index),
                ranges[index],
                own[index],
                unified,
                scheme.act_bits,
                scheme.act_format,
            )
            for index, modality in enumerate(statistics.modalities)
        }
    shared = {n: shared_weight(w, own[0], scheme) for n, w in weights.items()}
    return InputStudy(
        InputAnalysis(
            linears=tuple(names),
            in_features=statistics.moments[0].sum.numel(),
            ranges=_ranges(statistics),
            losses=losses,
            spread=input_spread(statistics, weights, alpha),
        ),
        {
            modality: compensation_curves(
                weights, shared, own[index], statistics.moments[index], ranks
            )
            for index, modality in enumerate(statistics.modalities)
            if index > 0
        },
    )


def _ranges(statistics: InputStatistics) -> dict[str, ModalityRange]:
    """Modality to its range, and in how many channels it decides for all."""
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
