# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much a quantized model differs from its original, and why."""

from torchao_masquant.evaluation.analysis import (
    Analysis,
    EffectiveRank,
    InputAnalysis,
    ModalityRange,
    SmoothingLoss,
)
from torchao_masquant.evaluation.analyze import analyze
from torchao_masquant.evaluation.evaluate import evaluate
from torchao_masquant.evaluation.evaluation import (
    ContentScore,
    Evaluation,
    LinearSQNR,
    ModalityScore,
    TaskScore,
)
from torchao_masquant.evaluation.sqnr import SQNR, linear_sqnr

__all__ = [
    "SQNR",
    "Analysis",
    "ContentScore",
    "EffectiveRank",
    "Evaluation",
    "InputAnalysis",
    "LinearSQNR",
    "ModalityRange",
    "ModalityScore",
    "SmoothingLoss",
    "TaskScore",
    "analyze",
    "evaluate",
    "linear_sqnr",
]
