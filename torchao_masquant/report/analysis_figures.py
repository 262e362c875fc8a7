# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the modalities of a dense model differ."""

import math
from typing import Optional, Sequence

from torchao_masquant.evaluation import Analysis, InputAnalysis
from torchao_masquant.evaluation.tables import short_names
from torchao_masquant.report.chart import (
    Band,
    Columns,
    Figure,
    Line,
    Look,
    Panel,
    Point,
    Series,
    Span,
)
from torchao_masquant.report.palette import MUTED, method_look, modality_look
from torchao_masquant.report.places import Kind, input_kinds, kinds
from torchao_masquant.report.scale import share_y_range
from torchao_masquant.report.wording import amount, method_name, percent
from torchao_masquant.solver.modality_spread import MUCH

__all__ = [
    "dominance_figure",
    "effective_rank_figure",
    "own_factor_figure",
    "range_figure",
    "rank_figure",
    "theorem_figure",
]


def _input_kinds(analysis: Analysis) -> list[Kind]:
    return input_kinds({name: i.linears for name, i in analysis.inputs.items()})


def _places(
    analysis: Analysis, kind: Kind, modality: str
) -> list[tuple[int, InputAnalysis]]:
    """(layer, input) of the inputs that saw a modality."""
    return [
        (layer, analysis.inputs[name])
        for layer, name in kind.places
        if modality in analysis.inputs[name].ranges
    ]


def range_figure(analysis: Analysis, modalities: Sequence[str]) -> Figure:
    """Largest activation of each modality by layer, and where most channels lie.

    Args:
        analysis: of the model.
        modalities: all of the page, which give the colours.
    """
    panels = []
    for kind in _input_kinds(analysis):
        series: list[Series] = []
        for modality in analysis.modalities:
            look = modality_look(modality, modalities)
            found = _places(analysis, kind, modality)
            series.append(
                Band(
                    "",
                    look,
                    tuple(
                        Span(layer, i.ranges[modality].low, i.ranges[modality].high)
                        for layer, i in found
                    ),
                )
            )
            series.append(
                Line(
                    modality,
                    look,
                    tuple(
                        Point(
                            layer,
                            i.ranges[modality].absmax,
                            f"{kind.place_name(layer)}, {modality}: largest "
                            f"{amount(i.ranges[modality].absmax)}, median channel "
                            f"{amount(i.ranges[modality].median)}, "
                            f"{i.ranges[modality].tokens} tokens",
                        )
                        for layer, i in found
                    ),
                )
            )
        panels.append(
            Panel(
                kind.title,
                "max |x| over tokens",
                kind.x_label,
                tuple(series),
                log=True,
                categories=kind.categories,
                whole=True,
            )
        )
    return Figure(
        "ranges",
        "Activation ranges",
        "Each line is the largest value that a modality brings to an input, its band "
        "the middle 90 % of that input's channels: lines far apart mean that one scale "
        "cannot suit all tokens.",
        tuple(panels),
    )


def dominance_figure(analysis: Analysis, modalities: Sequence[str]) -> Figure:
    """Share of the channels whose unified factor a modality decides."""
    panels = []
    for kind in _input_kinds(analysis):
        bottoms = {layer: 0.0 for layer, _ in kind.places}
        series: list[Series] = []
        for modality in analysis.modalities:
            spans = []
            for layer, study in _places(analysis, kind, modality):
                share = study.ranges[modality].dominance
                low = bottoms[layer]
                bottoms[layer] = low + 100 * (0.0 if math.isnan(share) else share)
                title = f"{kind.place_name(layer)}: {modality} decides {percent(share)} of the channels"
                spans.append(Span(layer, low, bottoms[layer], title))
            look = modality_look(modality, modalities)
            series.append(Columns(modality, look, tuple(spans)))
        panels.append(
            Panel(
                kind.title,
                "channels, %",
                kind.x_label,
                tuple(series),
                categories=kind.categories,
                whole=True,
                y_range=(0.0, 100.0),
            )
        )
    return Figure(
        "dominance",
        "Who decides the unified factor",
        "A bar shows in how many of an input's channels each modality is the loudest "
        "and so sets the smoothing factor of all: the others are rounded on its scale.",
        tuple(panels),
    )


def own_factor_figure(
    analysis: Analysis, modalities: Sequence[str]
) -> Optional[Figure]:
    """What a factor of its own would gain a modality, after shift and rotation.

    Returns:
        None where there is one modality, or an analysis of before it was measured.
    """
    spreads = analysis.spreads
    if not spreads or len(analysis.modalities) < 2:
        return None
    panels = []
    for kind in _input_kinds(analysis):
        places = [(layer, name) for layer, name in kind.places if name in spreads]
        series: list[Series] = [
            Line(
                f"{MUCH:g} dB: much",
                Look(MUTED, "", "dashed", 1.25),
                tuple(Point(layer, MUCH) for layer, _ in places),
            )
        ]
        for modality in analysis.modalities:
            points = []
            for layer, name in places:
                found = spreads[name].modalities[modality]
                points.append(
                    Point(
                        layer,
                        found.gain_rotated,
                        f"{kind.place_name(layer)}, {modality}: "
                        f"{amount(found.gain_rotated, '.1f')} dB "
                        f"({amount(found.gain, '.1f')} dB without rotation), "
                        f"{percent(found.constant_share)} of the loudest channels "
                        f"constant, {percent(found.sink_share)} sinks",
                    )
                )
            look = modality_look(modality, modalities)
            series.append(Line(modality, look, tuple(points)))
        panels.append(
            Panel(
                kind.title,
                "less rounding error, dB",
                kind.x_label,
                tuple(series),
                categories=kind.categories,
                whole=True,
            )
        )
    return Figure(
        "own_factors",
        "What factors of their own would gain",
        "Each line is how much less a modality's rounding would add with a factor of its "
        "own, after shift and rotation: below the dashed line own factors cost the shared "
        "weight more than they gain.",
        share_y_range(panels),
    )


def theorem_figure(analysis: Analysis, modalities: Sequence[str]) -> Optional[Figure]:
    """Predicted against measured loss by the unified factor.

    Returns:
        None where activations are not quantized.
    """
    if not any(study.losses for study in analysis.inputs.values()):
        return None
    _, short = short_names(list(analysis.inputs))
    panels = []
    for title, field, correlation in (
        ("Theorem 1", "predicted", analysis.correlation),
        (
            "Scale per token",
            "predicted_per_token",
            analysis.correlation_per_token,
        ),
    ):
        series: list[Series] = []
        drawn: list[float] = []
        for modality in analysis.modalities:
            points = []
            for name, study in zip(short, analysis.inputs.values()):
                if modality not in study.losses:
                    continue
                loss = study.losses[modality]
                x, y = getattr(loss, field), loss.measured
                drawn += [v for v in (x, y) if math.isfinite(v)]
                points.append(
                    Point(
                        x,
                        y,
                        f"{name}, {modality}: predicted {amount(x, '.1f')} dB, "
                        f"measured {amount(y, '.1f')} dB",
                    )
                )
            look = modality_look(modality, modalities, dash="none")
            series.append(Line(modality, look, tuple(points)))
        ends = min(drawn, default=0.0), max(drawn, default=1.0)
        diagonal = tuple(Point(end, end) for end in ends)
        series.insert(
            0, Line("predicted = measured", Look(MUTED, "", "dashed", 1.25), diagonal)
        )
        panels.append(
            Panel(
                f"{title}: correlation {amount(correlation, '.3f')}",
                "measured loss, dB",
                "predicted loss, dB",
                tuple(series),
            )
        )
    return Figure(
        "theorem_1",
        "Theorem 1: predicted and measured loss",
        "Each point is one input and modality, and what its activations lose by the "
        "unified factor in place of their own: the nearer to the dashed line, the "
        "better the theorem foretells it.",
        tuple(panels),
    )


def effective_rank_figure(analysis: Analysis, modalities: Sequence[str]) -> Figure:
    """How many directions the weight difference has, whitened and not."""
    panels = []
    for kind in kinds(analysis.effective_ranks):
        series: list[Series] = []
        for modality in analysis.modalities[1:]:
            for field, dash, how in (
                ("plain", "dotted", "without whitening"),
                ("whitened", "solid", "whitened"),
            ):
                points = []
                for layer, name in kind.places:
                    rank = analysis.effective_ranks[name].get(modality)
                    if rank is None:
                        continue
                    value = getattr(rank, field)
                    points.append(
                        Point(
                            layer,
                            value,
                            f"{kind.place_name(layer)}, {modality}, {how}: {amount(value, '.1f')} of "
                            f"{rank.full}",
                        )
                    )
                look = modality_look(modality, modalities, dash)
                series.append(Line(f"{modality}, {how}", look, tuple(points)))
        panels.append(
            Panel(
                kind.title,
                "effective rank",
                kind.x_label,
                tuple(series),
                log=True,
                categories=kind.categories,
                whole=True,
            )
        )
    return Figure(
        "effective_ranks",
        "Effective rank of what the pair repairs",
        "The lower a line, the fewer directions hold the difference between a "
        "modality's weight and the shared one: whitening by the activations (solid) is "
        "what makes a small pair enough.",
        tuple(panels),
    )


def rank_figure(analysis: Analysis) -> Figure:
    """Output SQNR against the rank of the pair."""
    methods = list(analysis.sqnr_by_rank)
    panels = []
    for modality in analysis.modalities[1:]:
        series = []
        for method, curves in analysis.sqnr_by_rank.items():
            points = tuple(
                Point(
                    100 * rank,
                    value,
                    f"{method_name(method)}, rank {100 * rank:g} %: "
                    f"{amount(value, '.1f')} dB",
                )
                for rank, value in zip(analysis.ranks, curves.get(modality, ()))
            )
            look = method_look(method, methods)
            series.append(Line(method_name(method), look, points))
        panels.append(
            Panel(
                modality,
                "centred output SQNR, mean over linears, dB",
                "rank of the pair, % of min(N, K)",
                tuple(series),
            )
        )
    return Figure(
        "sqnr_by_rank",
        "What rank buys",
        "Higher is better: the signal-to-noise ratio of a linear's output with the "
        "shared weight and a pair of that rank, activations not rounded.",
        share_y_range(panels),
    )
