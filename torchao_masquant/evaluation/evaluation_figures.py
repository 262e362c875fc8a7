# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures of an evaluation."""

from typing import Any

from torchao_masquant.evaluation.evaluation import Evaluation
from torchao_masquant.evaluation.plotting import (
    finite,
    legend_below,
    panels_by_place,
    style_of,
)

__all__ = ["figures"]


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """See :meth:`~torchao_masquant.evaluation.evaluation.Evaluation.figures`."""
    return {"sqnr_by_layer": _sqnr_by_layer(evaluation)} if evaluation.sqnr else {}


def _sqnr_by_layer(evaluation: Evaluation) -> Any:
    figure, panels = panels_by_place(evaluation.sqnr, 3, 2.8)
    entries: dict[str, Any] = {}
    for axis, places in panels:
        for modality in evaluation.modalities:
            found = [
                (place, evaluation.sqnr[name][modality])
                for place, name in places
                if modality in evaluation.sqnr[name]
            ]
            if not found:
                continue
            style = style_of(modality, evaluation.modalities)
            layers = [place for place, _ in found]
            (entries[f"{modality}, centred"],) = axis.plot(
                layers, finite(r.centered for _, r in found), **style.line
            )
            (entries[f"{modality}, plain"],) = axis.plot(
                layers,
                finite(r.plain for _, r in found),
                linestyle=":",
                markerfacecolor="none",
                **style.line,
            )
        axis.set_ylabel("output SQNR, dB")
    legend_below(figure, entries)
    figure.suptitle(
        f"{evaluation.model}, {evaluation.scheme}: "
        "signal-to-quantization-noise ratio of each linear"
    )
    return figure
