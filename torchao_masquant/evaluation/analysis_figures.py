# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures of an analysis."""

import math
from typing import Any

from torchao_masquant.evaluation.analysis import Analysis
from torchao_masquant.evaluation.plotting import (
    finite,
    legend_below,
    new_figure,
    panels_by_place,
    style_of,
)
from torchao_masquant.solver.modality_spread import MUCH

__all__ = ["figures"]

_LINESTYLES = {"masquant": "-", "masquant-paper": "--"}


def figures(analysis: Analysis) -> dict[str, Any]:
    """See :meth:`~torchao_masquant.evaluation.analysis.Analysis.figures`."""
    found = {"ranges": _ranges(analysis), "dominance": _dominance(analysis)}
    if analysis.spreads and len(analysis.modalities) > 1:
        found["own_factors"] = _own_factors(analysis)
    if any(study.losses for study in analysis.inputs.values()):
        found["theorem_1"] = _theorem_1(analysis)
    if len(analysis.modalities) > 1:
        found["effective_ranks"] = _effective_ranks(analysis)
        found["sqnr_by_rank"] = _sqnr_by_rank(analysis)
    return found


def _ranges(analysis: Analysis) -> Any:
    figure, panels = panels_by_place(analysis.inputs, 2, 3.0)
    entries: dict[str, Any] = {}
    for axis, places in panels:
        layers = [place for place, _ in places]
        for modality in analysis.modalities:
            ranges = [analysis.inputs[name].ranges[modality] for _, name in places]
            style = style_of(modality, analysis.modalities)
            (entries[f"{modality}, largest"],) = axis.plot(
                layers, [_positive(r.absmax) for r in ranges], **style.line
            )
            (entries[f"{modality}, median channel"],) = axis.plot(
                layers,
                [_positive(r.median) for r in ranges],
                linestyle=":",
                **style.line,
            )
            axis.fill_between(
                layers,
                [_positive(r.low) for r in ranges],
                [_positive(r.high) for r in ranges],
                color=style.color,
                alpha=0.15,
                linewidth=0,
            )
        axis.set_yscale("log")
        axis.set_ylabel("max |x| over tokens")
    legend_below(figure, entries)
    figure.suptitle(
        f"{analysis.model}: activation range (band: 5 to 95 % of the channels)"
    )
    return figure


def _positive(value: float) -> float:
    """A value for a logarithmic axis, which has no place for zero."""
    return value if value > 0 else math.nan


def _dominance(analysis: Analysis) -> Any:
    figure, panels = panels_by_place(analysis.inputs, 2, 2.6)
    entries: dict[str, Any] = {}
    for axis, places in panels:
        layers = [place for place, _ in places]
        bottom = [0.0] * len(places)
        for modality in analysis.modalities:
            shares = [
                100 * analysis.inputs[name].ranges[modality].dominance
                for _, name in places
            ]
            style = style_of(modality, analysis.modalities)
            entries[modality] = axis.bar(
                layers,
                shares,
                bottom=bottom,
                color=style.color,
                hatch=style.hatch,
                edgecolor="white",
            )
            bottom = [b + s for b, s in zip(bottom, shares)]
        axis.set_ylim(0, 100)
        axis.set_ylabel("channels, %")
    legend_below(figure, entries)
    figure.suptitle(f"{analysis.model}: which modality sets the unified factor")
    return figure


def _own_factors(analysis: Analysis) -> Any:
    spreads = analysis.spreads
    figure, panels = panels_by_place(spreads, 2, 2.6)
    entries: dict[str, Any] = {}
    for axis, places in panels:
        layers = [place for place, _ in places]
        for modality in analysis.modalities:
            (entries[modality],) = axis.plot(
                layers,
                finite(spreads[n].modalities[modality].gain_rotated for _, n in places),
                **style_of(modality, analysis.modalities).line,
            )
        entries[f"{MUCH:g} dB: much"] = axis.axhline(
            MUCH, color="0.5", linestyle="--", linewidth=1
        )
        axis.set_ylabel("less error, dB")
    legend_below(figure, entries)
    figure.suptitle(
        f"{analysis.model}: what factors of their own would gain, after the shift, rotated"
    )
    return figure


def _theorem_1(analysis: Analysis) -> Any:
    panels = {
        "theorem 1": ("predicted", analysis.correlation),
        "scale per token": ("predicted_per_token", analysis.correlation_per_token),
    }
    figure, axes = new_figure(1, 2, 4.2)
    entries: dict[str, Any] = {}
    for axis, (title, (field, correlation)) in zip(axes, panels.items()):
        drawn: list[float] = []
        for modality in analysis.modalities:
            losses = [
                study.losses[modality]
                for study in analysis.inputs.values()
                if modality in study.losses
            ]
            x = finite(getattr(loss, field) for loss in losses)
            y = finite(loss.measured for loss in losses)
            style = style_of(modality, analysis.modalities)
            entries[modality] = axis.scatter(
                x, y, color=style.color, marker=style.marker, s=22, alpha=0.8
            )
            drawn += [v for v in (*x, *y) if not math.isnan(v)]
        ends = [min(drawn, default=0.0), max(drawn, default=1.0)]
        (entries["predicted = measured"],) = axis.plot(
            ends, ends, color="0.5", linestyle="--", linewidth=1
        )
        axis.set_xlabel("predicted loss of activation SQNR, dB")
        axis.set_ylabel("measured loss, dB")
        axis.set_title(f"{title}: correlation {correlation:.3f}", fontsize=10)
    legend_below(figure, entries)
    figure.suptitle(
        f"{analysis.model}, {analysis.scheme}: unified instead of own smoothing factor"
    )
    return figure


def _effective_ranks(analysis: Analysis) -> Any:
    figure, panels = panels_by_place(analysis.effective_ranks, 3, 2.8)
    entries: dict[str, Any] = {}
    for axis, places in panels:
        layers = [place for place, _ in places]
        for modality in analysis.modalities[1:]:
            ranks = [analysis.effective_ranks[name][modality] for _, name in places]
            style = style_of(modality, analysis.modalities)
            (entries[f"{modality}, plain"],) = axis.plot(
                layers,
                [_positive(r.plain) for r in ranks],
                linestyle=":",
                markerfacecolor="none",
                **style.line,
            )
            (entries[f"{modality}, whitened"],) = axis.plot(
                layers, [_positive(r.whitened) for r in ranks], **style.line
            )
        (entries["full rank"],) = axis.plot(
            layers,
            [
                max(r.full for r in analysis.effective_ranks[n].values())
                for _, n in places
            ],
            color="0.5",
            linewidth=1,
        )
        axis.set_yscale("log")
        axis.set_ylabel("effective rank")
    legend_below(figure, entries)
    figure.suptitle(
        f"{analysis.model}, {analysis.scheme}: effective rank of the weight difference"
    )
    return figure


def _sqnr_by_rank(analysis: Analysis) -> Any:
    figure, (axis,) = new_figure(1, 1, 4.2)
    percent = [100 * rank for rank in analysis.ranks]
    entries: dict[str, Any] = {}
    for method, curves in analysis.sqnr_by_rank.items():
        for modality, values in curves.items():
            (entries[f"{modality}, {method}"],) = axis.plot(
                percent,
                finite(values),
                linestyle=_LINESTYLES.get(method, ":"),
                **style_of(modality, analysis.modalities).line,
            )
    axis.set_xlabel("rank of the pair, % of min(N, K)")
    axis.set_ylabel("centred output SQNR,\nmean over linears, dB")
    legend_below(figure, entries)
    figure.suptitle(
        f"{analysis.model}, {analysis.scheme}: compensation by rank, "
        "activations not rounded"
    )
    return figure
