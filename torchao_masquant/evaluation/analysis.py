# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What :func:`~torchao_masquant.evaluation.analyze` found."""

import math
import statistics
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from rich.console import RenderableType

from torchao_masquant.evaluation.json_record import JSONRecord
from torchao_masquant.options import get_scheme
from torchao_masquant.solver.modality_spread import InputSpread, verdict

__all__ = [
    "Analysis",
    "EffectiveRank",
    "InputAnalysis",
    "ModalityRange",
    "SmoothingLoss",
]


@dataclass(frozen=True)
class ModalityRange:
    """Range of the tokens of one modality at one input.

    Attributes:
        tokens: how many were seen.
        absmax: ``max |x|`` over tokens and channels.
        median: median over the channels of ``max_t |x|``.
        low: 0.05 quantile over the channels of ``max_t |x|``.
        high: 0.95 quantile over the channels of ``max_t |x|``.
        dominance: share of the channels in which this modality sets the unified
            (SmoothQuant) factor, that is whose ``max_t |x|`` is the largest of all
            modalities, 0..1. A tie is split evenly; channels that no token uses are
            left out. Sums to 1 over the modalities.
    """

    tokens: int
    absmax: float
    median: float
    low: float
    high: float
    dominance: float


@dataclass(frozen=True)
class SmoothingLoss:
    """What one modality's activations lose by a factor that all modalities share.

    See :mod:`torchao_masquant.evaluation.smoothing_loss` for the formulas.

    Attributes:
        predicted: loss of activation SQNR that theorem 1 of arXiv 2603.04800 predicts
            from the ranges, in dB.
        predicted_per_token: the same with the activations' scale found per token, as
            it is at run time, in dB.
        measured: ``own - unified``, in dB.
        own: SQNR of the activations smoothed by the modality's own factor and
            quantized, in dB.
        unified: SQNR of the same tokens smoothed by the unified factor, in dB.
        tokens: how many were quantized.
    """

    predicted: float
    predicted_per_token: float
    measured: float
    own: float
    unified: float
    tokens: int


@dataclass(frozen=True)
class InputAnalysis:
    """One input, which one or more linears read.

    Attributes:
        linears: names of the linears that read it.
        in_features: K, its channels.
        ranges: modality to range.
        losses: modality to the loss by the unified factor.
        spread: how much the modalities differ, and sinks; None in files of before it
            was there.
    """

    ADDED: ClassVar[tuple[str, ...]] = ("spread",)

    linears: tuple[str, ...]
    in_features: int
    ranges: dict[str, ModalityRange]
    losses: dict[str, SmoothingLoss]
    spread: Optional[InputSpread] = None


@dataclass(frozen=True)
class EffectiveRank:
    """Of the weight difference that one modality's pair makes up for.

    ``exp(-sum_i p_i log p_i)`` with ``p_i = sigma_i^2 / sum_j sigma_j^2`` of the
    singular values sigma of ``dW_m = W s_m - Q(W s_base)``, without gauge.

    Attributes:
        plain: of ``dW_m`` itself.
        whitened: of ``dW_m C^1/2``, C the uncentred covariance of ``x / s_m``.
        full: ``min(N, K)``, the most that either can be.
    """

    plain: float
    whitened: float
    full: int


@dataclass(frozen=True)
class Analysis(JSONRecord):
    """How modalities differ in a dense model, and what that means for quantization.

    Attributes:
        model: name of the model's class.
        scheme: whose bits the losses, ranks and ratios are for.
        alpha: exponent of the activations in the smoothing factors.
        modalities: names, base first.
        inputs: first linear that reads an input to the input's analysis, in the
            model's order.
        effective_ranks: linear to modality (all but the base) to effective rank.
        ranks: ranks of the low-rank pair, shares (float) of ``min(N, K)``, ascending.
        sqnr_by_rank: method ("masquant-paper", "masquant") to modality (all but the
            base) to one value for each of ``ranks``: the mean over the linears of the
            centred SQNR of the linear's output with the shared quantized weight and
            the pair, in dB. Computed from the covariance: activations are not rounded.
    """

    KIND: ClassVar[str] = "analysis"
    FORMAT: ClassVar[str] = "torchao_masquant.analysis.1"

    model: str
    scheme: str
    alpha: float
    modalities: tuple[str, ...]
    inputs: dict[str, InputAnalysis]
    effective_ranks: dict[str, dict[str, EffectiveRank]]
    ranks: tuple[float, ...]
    sqnr_by_rank: dict[str, dict[str, tuple[float, ...]]]

    def _losses(self) -> list[SmoothingLoss]:
        return [loss for i in self.inputs.values() for loss in i.losses.values()]

    @property
    def correlation(self) -> float:
        """Pearson correlation of ``predicted`` and ``measured`` losses.

        Over all inputs and modalities; nan where either does not vary.
        """
        return _pearson([(loss.predicted, loss.measured) for loss in self._losses()])

    @property
    def correlation_per_token(self) -> float:
        """The same of ``predicted_per_token`` and ``measured``."""
        return _pearson(
            [(loss.predicted_per_token, loss.measured) for loss in self._losses()]
        )

    @property
    def spreads(self) -> dict[str, InputSpread]:
        """Input to how much the modalities differ there, where that is known."""
        found = {name: i.spread for name, i in self.inputs.items()}
        return {name: spread for name, spread in found.items() if spread is not None}

    @property
    def verdict(self) -> str:
        """One sentence: whether modalities differ by much, and what to do about it.

        Empty for an analysis of before that was measured.
        """
        spreads = self.spreads
        return verdict(spreads, get_scheme(self.scheme).act_bits) if spreads else ""

    def __rich__(self) -> RenderableType:
        from torchao_masquant.evaluation.analysis_table import render

        return render(self)

    def __str__(self) -> str:
        from torchao_masquant.evaluation.tables import to_text

        return to_text(self.__rich__())

    def figures(self) -> dict[str, Any]:
        """Matplotlib figures, by name, each left out where there is nothing to show.

        "ranges" (activation range by layer), "dominance" (who sets the unified
        factor), "own_factors" (what factors of their own would gain), "theorem_1"
        (predicted against measured loss), "effective_ranks", "sqnr_by_rank".

        Raises:
            ImportError: matplotlib is missing.
        """
        from torchao_masquant.evaluation.analysis_figures import (
            compensation_drawings,
            modality_drawings,
        )

        found = [
            *modality_drawings(self, self.modalities),
            *compensation_drawings(self, self.modalities),
        ]
        about = f"{self.model}, {self.scheme}"
        return {drawing.name: drawing.titled(about) for drawing in found}


def _pearson(points: list[tuple[float, float]]) -> float:
    """Correlation of the points that are finite."""
    finite = [point for point in points if all(map(math.isfinite, point))]
    try:
        return statistics.correlation([x for x, _ in finite], [y for _, y in finite])
    # There are fewer than two, or they do not vary.
    except statistics.StatisticsError:
        return math.nan
