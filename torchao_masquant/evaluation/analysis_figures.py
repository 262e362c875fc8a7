# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How the modalities of a dense model differ."""

import math
from typing import Optional, Sequence

from torchao_masquant.evaluation.analysis import Analysis
from torchao_masquant.evaluation.tables import short_names
from torchao_masquant.figures.drawing import Drawing, by_kind, drawing
from torchao_masquant.figures.panel import Panel
from torchao_masquant.figures.places import Kind, input_kinds, kinds
from torchao_masquant.figures.style import (
    GUIDE,
    MUTED,
    PLAIN,
    method_look,
    modality_color,
    modality_look,
)
from torchao_masquant.solver.modality_spread import MUCH
from torchao_masquant.wording import amount, method_name, percent

__all__ = ["compensation_drawings", "modality_drawings"]


def modality_drawings(analysis: Analysis, modalities: Sequence[str]) -> list[Drawing]:
    """Ranges, who decides the unified factor, and what that costs.

    Args:
        analysis: of the model.
        modalities: all that are shown together, which give the colours.

    Raises:
        ImportError: matplotlib is missing.
    """
    found = (_ranges, _dominance, _own_factors, _theorem_1)
    return [made for draw in found if (made := draw(analysis, modalities)) is not None]


def compensation_drawings(
    analysis: Analysis, modalities: Sequence[str]
) -> list[Drawing]:
    """What a low-rank pair can repair; see :func:`modality_drawings`."""
    if len(analysis.modalities) < 2:
        return []
    found = (_effective_ranks, _sqnr_by_rank)
    return [made for draw in found if (made := draw(analysis, modalities)) is not None]


def _input_kinds(analysis: Analysis) -> list[Kind]:
    return input_kinds({name: i.linears for name, i in analysis.inputs.items()})


def _ranges(analysis: Analysis, modalities: Sequence[str]) -> Optional[Drawing]:
    def draw(panel: Panel, kind: Kind) -> None:
        for modality in analysis.modalities:
            ranges = {
                name: study.ranges[modality]
                for name, study in analysis.inputs.items()
                if modality in study.ranges
            }
            color = modality_color(modality, modalities)
            panel.band(kind, {n: (r.low, r.high) for n, r in ranges.items()}, color)
            panel.by_layer(
                kind,
                f"{modality}, median channel",
                {n: (r.median, amount(r.median)) for n, r in ranges.items()},
                color=color,
                **PLAIN,
            )
            panel.by_layer(
                kind,
                modality,
                {
                    name: (
                        r.absmax,
                        f"largest {amount(r.absmax)}, median channel "
                        f"{amount(r.median)}, {r.tokens} tokens",
                    )
                    for name, r in ranges.items()
                },
                **modality_look(modality, modalities),
            )

    return by_kind(
        "ranges",
        "Activation ranges",
        "Each line is the largest value that a modality brings to an input, its band "
        "the middle 90 % of that input's channels: lines far apart mean that one scale "
        "cannot suit all tokens.",
        _input_kinds(analysis),
        "max |x| over tokens",
        draw,
        log=True,
    )


def _dominance(analysis: Analysis, modalities: Sequence[str]) -> Optional[Drawing]:
    def draw(panel: Panel, kind: Kind) -> None:
        for modality in analysis.modalities:
            shares = {
                name: study.ranges[modality].dominance
                for name, study in analysis.inputs.items()
                if modality in study.ranges
            }
            panel.stack(
                kind,
                modality,
                {
                    name: (100 * share, f"decides {percent(share)} of the channels")
                    for name, share in shares.items()
                },
                modality_color(modality, modalities),
            )
        panel.axis.set_ylim(0, 100)

    return by_kind(
        "dominance",
        "Who decides the unified factor",
        "A bar shows in how many of an input's channels each modality is the loudest "
        "and so sets the smoothing factor of all: the others are rounded on its scale.",
        _input_kinds(analysis),
        "channels, %",
        draw,
    )


def _own_factors(analysis: Analysis, modalities: Sequence[str]) -> Optional[Drawing]:
    """None where there is one modality, or an analysis of before it was measured."""
    if not analysis.spreads or len(analysis.modalities) < 2:
        return None

    def draw(panel: Panel, kind: Kind) -> None:
        panel.guide(f"{MUCH:g} dB: much", MUCH)
        for modality in analysis.modalities:
            spreads = {n: s.modalities[modality] for n, s in analysis.spreads.items()}
            panel.by_layer(
                kind,
                modality,
                {
                    name: (
                        spread.gain_rotated,
                        f"{amount(spread.gain_rotated, '.1f')} dB "
                        f"({amount(spread.gain, '.1f')} dB without rotation), "
                        f"{percent(spread.constant_share)} of the loudest channels "
                        f"constant, {percent(spread.sink_share)} sinks",
                    )
                    for name, spread in spreads.items()
                },
                **modality_look(modality, modalities),
            )

    return by_kind(
        "own_factors",
        "What factors of their own would gain",
        "Each line is how much less a modality's rounding would add with a factor of its "
        "own, after shift and rotation: below the dashed line own factors cost the shared "
        "weight more than they gain.",
        _input_kinds(analysis),
        "less rounding error, dB",
        draw,
        share_y="all",
    )


def _theorem_1(analysis: Analysis, modalities: Sequence[str]) -> Optional[Drawing]:
    """None where activations are not quantized."""
    if not any(study.losses for study in analysis.inputs.values()):
        return None
    _, short = short_names(list(analysis.inputs))
    with drawing(
        "theorem_1",
        "Theorem 1: predicted and measured loss",
        "Each point is one input and modality, and what its activations lose by the "
        "unified factor in place of their own: the nearer to the dashed line, the "
        "better the theorem foretells it.",
        2,
        height=3.4,
    ) as found:
        for panel, title, field, correlation in zip(
            found.panels,
            ("Theorem 1", "Scale per token"),
            ("predicted", "predicted_per_token"),
            (analysis.correlation, analysis.correlation_per_token),
        ):
            drawn: list[float] = []
            for modality in analysis.modalities:
                losses = [
                    (name, study.losses[modality])
                    for name, study in zip(short, analysis.inputs.values())
                    if modality in study.losses
                ]
                x = [getattr(loss, field) for _, loss in losses]
                y = [loss.measured for _, loss in losses]
                drawn += [v for v in (*x, *y) if math.isfinite(v)]
                panel.line(
                    modality,
                    x,
                    y,
                    [
                        f"{name}, {modality}: predicted {amount(a, '.1f')} dB, "
                        f"measured {amount(b, '.1f')} dB"
                        for (name, _), a, b in zip(losses, x, y)
                    ],
                    **modality_look(modality, modalities),
                    linestyle="none",
                )
            ends = [min(drawn, default=0.0), max(drawn, default=1.0)]
            panel.line("predicted = measured", ends, ends, **GUIDE)
            panel.name(
                f"{title}: correlation {amount(correlation, '.3f')}",
                "measured loss, dB",
                "predicted loss, dB",
            )
    return found


def _effective_ranks(
    analysis: Analysis, modalities: Sequence[str]
) -> Optional[Drawing]:
    ranks = {name: found for name, found in analysis.effective_ranks.items() if found}

    def draw(panel: Panel, kind: Kind) -> None:
        for modality in analysis.modalities[1:]:
            of = {n: found[modality] for n, found in ranks.items() if modality in found}
            for how, values, style in (
                ("without whitening", {n: rank.plain for n, rank in of.items()}, PLAIN),
                ("whitened", {n: rank.whitened for n, rank in of.items()}, {}),
            ):
                panel.by_layer(
                    kind,
                    f"{modality}, {how}",
                    {
                        name: (value, f"{amount(value, '.1f')} of {of[name].full}")
                        for name, value in values.items()
                    },
                    **{**modality_look(modality, modalities), **style},
                )
        full = [max(r.full for r in ranks[name].values()) for _, name in kind.places]
        panel.line("full rank", [x for x, _ in kind.places], full, color=MUTED)

    return by_kind(
        "effective_ranks",
        "Effective rank of what the pair repairs",
        "The lower a line, the fewer directions hold the difference between a "
        "modality's weight and the shared one: whitening by the activations (solid) is "
        "what makes a small pair enough.",
        kinds(ranks),
        "effective rank",
        draw,
        log=True,
    )


def _sqnr_by_rank(analysis: Analysis, modalities: Sequence[str]) -> Drawing:
    methods = list(analysis.sqnr_by_rank)
    others = analysis.modalities[1:]
    shares = [100 * rank for rank in analysis.ranks]
    with drawing(
        "sqnr_by_rank",
        "What rank buys",
        "Higher is better: the signal-to-noise ratio of a linear's output with the "
        "shared weight and a pair of that rank, activations not rounded.",
        len(others),
        height=2.8,
        share_y="all",
    ) as found:
        for panel, modality in zip(found.panels, others):
            for method, curves in analysis.sqnr_by_rank.items():
                values = curves.get(modality, ())
                panel.line(
                    method_name(method),
                    shares[: len(values)],
                    values,
                    [
                        f"{method_name(method)}, rank {share:g} %: "
                        f"{amount(value, '.1f')} dB"
                        for share, value in zip(shares, values)
                    ],
                    **method_look(method, methods),
                )
            panel.name(
                modality,
                "centred output SQNR, mean over linears, dB",
                "rank of the pair, % of min(N, K)",
            )
    return found
