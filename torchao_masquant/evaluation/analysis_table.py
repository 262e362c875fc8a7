# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""An analysis as tables."""

import math
import statistics
from typing import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from torchao_masquant.evaluation.analysis import Analysis
from torchao_masquant.evaluation.tables import new_table, number, short_names
from torchao_masquant.solver.modality_spread import sinks_of

__all__ = ["render"]


def render(analysis: Analysis) -> RenderableType:
    """Lay an analysis out: what theorem 1 says, ranks, and a line for each input."""
    parts: list[RenderableType] = [
        Text(
            f"{analysis.model}, {analysis.scheme}, alpha {analysis.alpha:g}; "
            f"{' / '.join(analysis.modalities)}"
        ),
        _inputs(analysis),
    ]
    if not math.isnan(analysis.correlation):
        parts.append(
            Text(
                "Loss by the unified factor, predicted against measured: correlation "
                f"{analysis.correlation:.3f} (theorem 1), "
                f"{analysis.correlation_per_token:.3f} (scale per token)"
            )
        )
    differ = len(analysis.modalities) > 1
    if differ:
        parts += [_effective_ranks(analysis), _curves(analysis)]
    if analysis.spreads:
        parts.append(_spreads(analysis))
        if differ:
            parts.append(_summary(analysis))
        sentences = [*sinks_of(analysis.spreads), analysis.verdict]
        parts.append(Text("\n".join(sentences)))
    return Group(*parts)


def _cells(values: Sequence[float], pattern: str, factor: float = 1.0) -> str:
    return " ".join(f"{number(value, pattern, factor):>6}" for value in values)


def _inputs(analysis: Analysis) -> RenderableType:
    lossy = any(i.losses for i in analysis.inputs.values())
    names = " ".join(f"{m:>6}" for m in analysis.modalities)
    path, inputs = short_names(list(analysis.inputs))
    table = new_table(
        "By input, named by the first linear that reads it"
        + (f", in {path}" if path else ""),
        ["input"],
        [f"largest value\n{names}", f"sets the factor, %\n{names}"]
        + ([f"loss, dB\n{names}", f"predicted, dB\n{names}"] if lossy else []),
    )
    for name, study in zip(inputs, analysis.inputs.values()):
        ranges = [study.ranges[m] for m in analysis.modalities]
        losses = [study.losses[m] for m in analysis.modalities if m in study.losses]
        table.add_row(
            name,
            _cells([r.absmax for r in ranges], ".3g"),
            _cells([r.dominance for r in ranges], ".0f", 100),
            *(
                [
                    _cells([loss.measured for loss in losses], ".1f"),
                    _cells([loss.predicted for loss in losses], ".1f"),
                ]
                if lossy
                else []
            ),
        )
    return table


def _effective_ranks(analysis: Analysis) -> RenderableType:
    table = new_table(
        "Effective rank of the weight difference, mean over the linears",
        ["modality"],
        ["plain", "whitened", "of at most"],
    )
    for modality in analysis.modalities[1:]:
        ranks = [ranks[modality] for ranks in analysis.effective_ranks.values()]
        table.add_row(
            modality,
            number(statistics.mean(r.plain for r in ranks), ".1f"),
            number(statistics.mean(r.whitened for r in ranks), ".1f"),
            number(statistics.mean(r.full for r in ranks), ".1f"),
        )
    return table


def _curves(analysis: Analysis) -> RenderableType:
    table = new_table(
        "Centred SQNR by rank of the pair, share of min(N, K), in dB",
        ["method", "modality"],
        [f"{100 * rank:g} %" for rank in analysis.ranks],
    )
    for method, curves in analysis.sqnr_by_rank.items():
        for modality, values in curves.items():
            table.add_row(method, modality, *(number(v, ".1f") for v in values))
    return table


def _spreads(analysis: Analysis) -> RenderableType:
    differ = len(analysis.modalities) > 1
    names = " ".join(f"{m:>6}" for m in analysis.modalities)
    path, inputs = short_names(list(analysis.spreads))
    table = new_table(
        "After the shift, by input" + (f", in {path}" if path else ""),
        ["input"],
        [
            f"constant, %\n{names}",
            f"sinks, %\n{names}",
            *(["range ratio", f"own factor, dB\n{names}"] if differ else []),
        ],
    )
    for name, spread in zip(inputs, analysis.spreads.values()):
        found = [spread.modalities[m] for m in analysis.modalities]
        table.add_row(
            name,
            _cells([m.constant_share for m in found], ".0f", 100),
            _cells([m.sink_share for m in found], ".1f", 100),
            *(
                [
                    number(spread.range_ratio, ".2f"),
                    _cells([m.gain_rotated for m in found], ".1f"),
                ]
                if differ
                else []
            ),
        )
    return table


def _summary(analysis: Analysis) -> RenderableType:
    """Of how modalities differ, over all inputs."""
    spreads = analysis.spreads.values()
    ratios = _known(spread.range_ratio for spread in spreads)
    table = new_table(
        "After the shift, over all inputs: range ratio "
        f"{statistics.geometric_mean(ratios):.2f}",
        ["modality"],
        [
            "constant, %",
            "own factor, dB\nmean",
            "\nat most",
            "not rotated, dB\nmean",
            "\nat most",
        ],
    )
    for modality in analysis.modalities:
        found = [spread.modalities[modality] for spread in spreads]
        constant = _known(m.constant_share for m in found)
        rotated = _known(m.gain_rotated for m in found)
        plain = _known(m.gain for m in found)
        table.add_row(
            modality,
            number(statistics.mean(constant), ".0f", 100),
            number(statistics.mean(rotated), ".1f"),
            number(max(rotated), ".1f"),
            number(statistics.mean(plain), ".1f"),
            number(max(plain), ".1f"),
        )
    return table


def _known(values: Iterable[float]) -> list[float]:
    """Those that are not nan; nan alone for none."""
    return [value for value in values if not math.isnan(value)] or [math.nan]
