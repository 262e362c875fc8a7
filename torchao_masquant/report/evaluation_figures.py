# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where in the model quantization noise arises, by method."""

from typing import Optional, Sequence

from torchao_masquant.evaluation import Evaluation
from torchao_masquant.evaluation.plotting import by_place
from torchao_masquant.report.chart import Figure, Line, Panel, Point
from torchao_masquant.report.palette import method_look
from torchao_masquant.report.scale import share_y_range
from torchao_masquant.report.wording import amount, method_name

__all__ = ["sqnr_figure"]


def sqnr_figure(
    evaluations: Sequence[tuple[str, Evaluation]],
) -> Optional[Figure]:
    """Centred SQNR by layer, a panel for each scheme and modality.

    Args:
        evaluations: method and evaluation.

    Returns:
        None where no evaluation was made against a reference.
    """
    found = [(m, e) for m, e in evaluations if e.sqnr]
    if not found:
        return None
    methods = list(dict.fromkeys(method for method, _ in found))
    schemes = dict.fromkeys(e.scheme for _, e in found)
    panels: list[Panel] = []
    for scheme in schemes:
        row = []
        same = [(m, e) for m, e in found if e.scheme == scheme]
        for modality in dict.fromkeys(m for _, e in same for m in e.modalities):
            names = _columns(same)
            lines = tuple(
                Line(
                    method_name(method),
                    method_look(method, methods),
                    _points(method, evaluation, modality, names),
                )
                # Ours last, so that it lies on top.
                for method, evaluation in sorted(same, key=lambda p: p[0] == "masquant")
            )
            row.append(
                Panel(
                    f"{scheme}, {modality}",
                    "centred output SQNR, dB",
                    "" if names else "decoder layer",
                    lines,
                    categories=names,
                    whole=True,
                )
            )
        panels += share_y_range(row)
    return Figure(
        "sqnr_by_layer",
        "Signal-to-noise ratio by layer",
        "Higher is better: the output of each layer's linears (their mean) against "
        "the noise of quantization, centred, so that only what varies from token to "
        "token counts as signal.",
        tuple(panels),
    )


def _columns(evaluations: Sequence[tuple[str, Evaluation]]) -> tuple[str, ...]:
    """Names for the x axis where the linears have no layer number; else none."""
    names = list(dict.fromkeys(n for _, e in evaluations for n in e.sqnr))
    return tuple(names) if "" in by_place(names) else ()


def _points(
    method: str, evaluation: Evaluation, modality: str, names: tuple[str, ...]
) -> tuple[Point, ...]:
    groups = by_place(evaluation.sqnr)
    layer_of = {name: layer for places in groups.values() for layer, name in places}
    found: dict[int, list[float]] = {}
    for name, ratios in evaluation.sqnr.items():
        if modality in ratios:
            x = names.index(name) if names else layer_of[name]
            found.setdefault(x, []).append(ratios[modality].centered)
    points = []
    for x, values in sorted(found.items()):
        mean = sum(values) / len(values)
        where = names[x] if names else f"layer {x}"
        title = f"{where}, {modality}, {method_name(method)}: {amount(mean, '.1f')} dB"
        points.append(Point(x, mean, title))
    return tuple(points)
