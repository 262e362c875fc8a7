# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe does to each layer: smoothing factors and memory."""

import re
from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from torchao_masquant.evaluation.plotting import by_place
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.chart import (
    Band,
    BarPanel,
    BarPart,
    BarRow,
    Figure,
    Line,
    Look,
    Panel,
    Point,
    Series,
    Span,
)
from torchao_masquant.report.palette import INK, MUTED, PARTS, modality_look
from torchao_masquant.report.places import Kind, input_kinds
from torchao_masquant.report.recipe_bytes import PART_NAMES, LayerBytes, recipe_bytes
from torchao_masquant.report.wording import amount, byte_size

__all__ = [
    "Quantiles",
    "bytes_figure",
    "ratio_figure",
    "shared_inputs",
    "smoothing_figure",
]


@dataclass(frozen=True)
class Quantiles:
    """Of the channels of one smoothing factor: 0, 0.05, 0.5, 0.95 and 1."""

    least: float
    low: float
    median: float
    high: float
    most: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Quantiles":
        """Of a (K,) tensor; nan where a value is nan."""
        levels = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
        return cls(*values.double().quantile(levels).tolist())


def shared_inputs(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Linears that share their smoothing factors, under the first one's name.

    A recipe does not say which linears read the same input. Neighbours in the model
    (of the same parent module) whose factors are equal are taken to.
    """
    groups: dict[tuple[str, bytes], list[str]] = {}
    for name, layer in recipe.layers.items():
        parent = name.rpartition(".")[0]
        factor = layer.smoothing_factor.float().contiguous()
        key = f"{parent} {tuple(factor.shape)}", factor.numpy().tobytes()
        groups.setdefault(key, []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def smoothing_figure(recipe: Recipe, modalities: Sequence[str]) -> Figure:
    """Range of the smoothing factors by layer.

    Args:
        recipe: with at least one linear.
        modalities: all of the page, which give the colours.
    """
    panels = []
    for kind in input_kinds(shared_inputs(recipe)):
        rows = max(recipe.layers[n].smoothing_factor.shape[0] for _, n in kind.places)
        series: list[Series] = []
        for index in range(rows):
            if rows == 1:
                title, look = "all modalities", Look(INK, "o")
            else:
                title = recipe.modalities[index]
                look = modality_look(title, modalities)
            spread = {
                name: Quantiles.of(recipe.layers[name].smoothing_factor[index])
                for _, name in kind.places
                if index < recipe.layers[name].smoothing_factor.shape[0]
            }
            series += _spread(kind, title, look, spread)
        panels.append(_panel(kind, "smoothing factor", series))
    return Figure(
        "smoothing",
        "Smoothing factors",
        "Each line is the median channel's factor of a modality, its band the middle "
        "90 % of the channels: activations are divided by it before they are rounded.",
        tuple(panels),
    )


def ratio_figure(recipe: Recipe, modalities: Sequence[str]) -> Optional[Figure]:
    """Factors of the other modalities against the base's, by layer.

    Returns:
        None where all modalities share one factor.
    """
    panels = []
    for kind in input_kinds(shared_inputs(recipe)):
        series: list[Series] = []
        for index, modality in enumerate(recipe.modalities[1:], start=1):
            spread = {}
            for _, name in kind.places:
                factor = recipe.layers[name].smoothing_factor.double()
                if factor.shape[0] > 1:
                    spread[name] = Quantiles.of(factor[index] / factor[0])
            if spread:
                look = modality_look(modality, modalities)
                series += _spread(kind, modality, look, spread)
        if series:
            ends = [place for place, _ in kind.places]
            one = tuple(Point(x, 1.0) for x in (min(ends), max(ends)))
            base = Line(
                f"{recipe.modalities[0]} (base)", Look(MUTED, "", "dashed", 1.25), one
            )
            label = f"s of the modality / s of {recipe.modalities[0]}"
            panels.append(_panel(kind, label, [base, *series]))
    if not panels:
        return None
    return Figure(
        "smoothing_ratio",
        "Factors against the base modality's",
        "Each line is the median over the channels of a modality's factor over the "
        "base's, its band the middle 90 %: wide bands far from the dashed line are "
        "what one shared factor gets wrong.",
        tuple(panels),
    )


def _spread(
    kind: Kind, name: str, look: Look, spread: dict[str, Quantiles]
) -> list[Series]:
    places = [(place, linear) for place, linear in kind.places if linear in spread]
    return [
        Band(
            "", look, tuple(Span(p, spread[n].low, spread[n].high) for p, n in places)
        ),
        Line(
            name,
            look,
            tuple(
                Point(
                    place,
                    spread[linear].median,
                    f"{kind.place_name(place)}, {name}: median {amount(spread[linear].median)}, "
                    f"from {amount(spread[linear].least)} to "
                    f"{amount(spread[linear].most)}",
                )
                for place, linear in places
            ),
        ),
    ]


def _panel(kind: Kind, y_label: str, series: Sequence[Series]) -> Panel:
    return Panel(
        kind.title,
        y_label,
        kind.x_label,
        tuple(series),
        log=True,
        categories=kind.categories,
        whole=True,
    )


def bytes_figure(recipe: Recipe) -> Figure:
    """Memory of each kind of linear, part by part, and of all."""
    sizes = recipe_bytes(recipe)
    kinds = {
        kind or re.sub(r".*\.", "", places[0][1]): [name for _, name in places]
        for kind, places in by_place(recipe.layers).items()
    }
    rows = []
    for kind, names in kinds.items():
        total = sum((sizes[name] for name in names), LayerBytes())
        parts = tuple(
            BarPart(
                PART_NAMES[part],
                color,
                getattr(total, part),
                f"{kind}: {byte_size(getattr(total, part))} of {PART_NAMES[part]}",
            )
            for part, color in zip(PART_NAMES, PARTS)
            if getattr(total, part)
        )
        share = (
            f" ({100 * total.total / total.bfloat16:.0f} %)" if total.bfloat16 else ""
        )
        rows.append(BarRow(kind, byte_size(total.total) + share, parts))
    return Figure(
        "bytes",
        "Where the bytes go",
        "A bar is the memory of one kind of linear over all layers, and the percentage "
        "is of the same weights in bfloat16.",
        (BarPanel(tuple(rows)),),
    )
