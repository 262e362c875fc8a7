# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe does to each layer: smoothing factors and memory."""

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import torch

from torchao_masquant.figures.drawing import Drawing, by_kind
from torchao_masquant.figures.panel import Bar, Panel
from torchao_masquant.figures.places import Kind, input_kinds, kinds
from torchao_masquant.figures.style import INK, PARTS, modality_look
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.recipe_bytes import PART_NAMES, LayerBytes, recipe_bytes
from torchao_masquant.report.row_figures import bar_figure
from torchao_masquant.wording import amount, byte_size, percent

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


def smoothing_figure(recipe: Recipe, modalities: Sequence[str]) -> Optional[Drawing]:
    """Range of the smoothing factors by layer.

    Args:
        recipe: with at least one linear.
        modalities: all of the page, which give the colours.
    """

    def draw(panel: Panel, kind: Kind) -> None:
        factors = {n: recipe.layers[n].smoothing_factor for _, n in kind.places}
        rows = max(factor.shape[0] for factor in factors.values())
        for index in range(rows):
            title, look = "all modalities", {"color": INK, "marker": "o"}
            if rows > 1:
                title = recipe.modalities[index]
                look = modality_look(title, modalities)
            found = {n: f[index] for n, f in factors.items() if index < f.shape[0]}
            _draw_spread(panel, kind, title, look, found)

    return by_kind(
        "smoothing",
        "Smoothing factors",
        "Each line is the median channel's factor of a modality, its band the middle "
        "90 % of the channels: activations are divided by it before they are rounded.",
        input_kinds(shared_inputs(recipe)),
        "smoothing factor",
        draw,
        log=True,
    )


def ratio_figure(recipe: Recipe, modalities: Sequence[str]) -> Optional[Drawing]:
    """Factors of the other modalities against the base's, by layer.

    Returns:
        None where all modalities share one factor.
    """
    base, *others = recipe.modalities
    own = {
        first: names
        for first, names in shared_inputs(recipe).items()
        if recipe.layers[first].smoothing_factor.shape[0] > 1
    }

    def draw(panel: Panel, kind: Kind) -> None:
        panel.guide(f"{base} (base)", 1.0)
        for index, modality in enumerate(others, start=1):
            found = {}
            for _, name in kind.places:
                factor = recipe.layers[name].smoothing_factor.double()
                found[name] = factor[index] / factor[0]
            look = modality_look(modality, modalities)
            _draw_spread(panel, kind, modality, look, found)

    return by_kind(
        "smoothing_ratio",
        "Factors against the base modality's",
        "Each line is the median over the channels of a modality's factor over the "
        "base's, its band the middle 90 %: wide bands far from the dashed line are "
        "what one shared factor gets wrong.",
        input_kinds(own),
        f"s of the modality / s of {base}",
        draw,
        log=True,
    )


def _draw_spread(
    panel: Panel,
    kind: Kind,
    label: str,
    look: dict[str, Any],
    values: dict[str, torch.Tensor],
) -> None:
    """Median and middle 90 % of the (K,) values of each linear."""
    spreads = {name: Quantiles.of(factor) for name, factor in values.items()}
    panel.band(kind, {n: (s.low, s.high) for n, s in spreads.items()}, look["color"])
    panel.by_layer(
        kind,
        label,
        {
            name: (
                s.median,
                f"median {amount(s.median)}, from {amount(s.least)} to {amount(s.most)}",
            )
            for name, s in spreads.items()
        },
        **look,
    )


def bytes_figure(recipe: Recipe) -> Optional[Drawing]:
    """Memory of each kind of linear, part by part, and of all."""
    sizes = recipe_bytes(recipe)
    bars = []
    for kind in kinds(recipe.layers):
        total = sum((sizes[name] for _, name in kind.places), LayerBytes())
        parts = [
            (name, size, color, f"{kind.title}: {byte_size(size)} of {name}")
            for (part, name), color in zip(PART_NAMES.items(), PARTS)
            if (size := getattr(total, part))
        ]
        text = byte_size(total.total)
        if total.bfloat16:
            text += f" ({percent(total.total / total.bfloat16, '.0f')})"
        bars.append(Bar(kind.title, text, parts))
    return bar_figure(
        "bytes",
        "Where the bytes go",
        "A bar is the memory of one kind of linear over all layers, and the percentage "
        "is of the same weights in bfloat16.",
        bars,
    )
