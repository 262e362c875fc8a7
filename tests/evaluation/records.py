# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Records with every kind of value in them, made by hand."""

import math

from torchao_masquant.evaluation import (
    Analysis,
    ContentScore,
    EffectiveRank,
    Evaluation,
    InputAnalysis,
    LinearSQNR,
    ModalityRange,
    ModalityScore,
    SmoothingLoss,
    TaskScore,
)
from torchao_masquant.solver.modality_spread import InputSpread, ModalitySpread

MODALITIES = ("text", "vision", "smell")


def evaluation(reference: bool = True) -> Evaluation:
    compared = (0.25, 2.0, 0.125, math.inf, 0.5) if reference else ()
    sqnr = {
        f"model.layers.{layer}.{kind}": {
            "text": LinearSQNR(30.0 + layer, 20.0),
            "vision": LinearSQNR(math.inf, -math.inf),
        }
        for layer in range(3)
        for kind in ("attn.q", "mlp.up")
    }
    return Evaluation(
        model="Model",
        modalities=MODALITIES,
        tasks={
            "a": TaskScore(4, 7, 0.75, 1.5, *compared),
            "b": TaskScore(1, 1, 0.0, 800.0, *compared),
        },
        by_modality={
            m: ModalityScore(3, 0.5 if reference else None) for m in MODALITIES
        },
        by_content={
            "text": ContentScore(4, 7, 1.5),
            "text+vision": ContentScore(1, 1, 800.0, 2.0 if reference else None),
        },
        weight_bytes=2048,
        quantized_linears=6,
        scheme="w4a8",
        method=None,
        reference_weight_bytes=8192 if reference else None,
        sqnr=sqnr if reference else {},
    )


def analysis(
    names: tuple[str, ...] = ("model.layers.0.q", "model.layers.1.q"),
    modalities: tuple[str, ...] = MODALITIES,
    losses: bool = True,
) -> Analysis:
    others = modalities[1:]
    return Analysis(
        model="Model",
        scheme="w4a8",
        alpha=0.5,
        modalities=modalities,
        inputs={
            name: InputAnalysis(
                linears=(name,),
                in_features=8,
                ranges={
                    m: ModalityRange(9, 4.0 + i, 1.0, 0.0, 2.0, 1 / len(modalities))
                    for m in modalities
                },
                losses={
                    m: SmoothingLoss(
                        1.0 * i + j, 2.0 * i - j, 2.0 * i, 40.0, 40 - 2.0 * i, 9
                    )
                    for j, m in enumerate(modalities)
                }
                if losses
                else {},
                spread=InputSpread(
                    1.5 + i,
                    {
                        m: ModalitySpread(
                            0.25, math.nan, 3.5 * i + j, 0.125 * j, j > 1, 40.0 + i
                        )
                        for j, m in enumerate(modalities)
                    },
                ),
            )
            for i, name in enumerate(names)
        },
        effective_ranks={
            name: {m: EffectiveRank(5.0, 2.0, 8) for m in others} for name in names
        },
        ranks=(0.0, 0.5),
        sqnr_by_rank={
            "masquant-paper": {m: (-math.inf, 10.0) for m in others},
            "masquant": {m: (math.nan, math.inf) for m in others},
        },
    )
