# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe says: options, memory, ranks and smoothing factors."""

from typing import Sequence

from torchao_masquant.evaluation.tables import short_names
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.recipe_bytes import PART_NAMES, LayerBytes, recipe_bytes
from torchao_masquant.report.recipe_figures import (
    Quantiles,
    bytes_figure,
    ratio_figure,
    shared_inputs,
    smoothing_figure,
)
from torchao_masquant.report.section import Cell, Column, Section, Table
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.wording import (
    MISSING,
    amount,
    byte_size,
    joined,
    method_name,
    percent,
)

__all__ = ["recipe_section"]

_ROUNDINGS = {
    "gptq": "by the error that it makes for all modalities together (GPTQ)",
    "nearest": "to nearest",
}


def recipe_section(recipe: Recipe, modalities: Sequence[str]) -> Section:
    """A section about a recipe with at least one linear.

    Args:
        recipe: what to tell of.
        modalities: all of the page, which give the colours.
    """
    ratio = ratio_figure(recipe, modalities)
    note = ""
    if ratio is None:
        note = (
            f"{method_name(recipe.options.method)} has one smoothing factor for all "
            "modalities, so there is no ratio between them to show."
        )
    return Section.of(
        "recipe",
        "The recipe",
        "What calibration decided for each linear: smoothing factors, low-rank pairs, "
        "and what they cost in memory.",
        (
            bytes_figure(recipe),
            smoothing_figure(recipe, modalities),
            ratio,
        ),
        (_options(recipe), _parts(recipe), _factors(recipe), _layers(recipe)),
        (note,),
    )


def _options(recipe: Recipe) -> Table:
    options, bits = recipe.options, recipe.options.bits
    group = "output channel"
    if bits.group_size is not None:
        group = f"{bits.group_size} neighbours in an output channel"
    activations = "not quantized"
    if not bits.weight_only:
        activations = f"{bits.act_bits} bits, one scale per token"
        if options.parts.shift:
            activations += ", less each modality's mean"
    rounding = _ROUNDINGS[options.parts.rounding]
    if options.parts.clip:
        rounding += ", of a clipped range where that errs less"
    values = {
        "scheme": options.scheme,
        "method": method_name(options.method),
        "weights": f"{bits.weight_bits} bits, "
        f"{'symmetric' if bits.symmetric else 'asymmetric'}, one scale per {group}",
        "rounding of the weights": rounding,
        "activations": activations,
        "alpha": _choice(options.alphas, options.parts.smooth),
        "separation of the modalities": _choice(
            options.separations, options.parts.per_modality
        ),
        "low-rank pairs": _pairs(options),
        **_modality_weights(options),
        "modalities": f"{joined(recipe.modalities)} (base: {recipe.modalities[0]})",
        "linears": str(len(recipe.layers)),
        **{f"made with {name}": version for name, version in recipe.versions.items()},
    }
    return Table(
        "Options of the recipe",
        (Column("option", number=False), Column("value", number=False)),
        tuple((Cell(name), Cell(value)) for name, value in values.items()),
    )


def _choice(values: Sequence[float], used: bool) -> str:
    if not used:
        return "not used"
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(texts) == 1 else f"for each input, one of {joined(texts)}"


def _pairs(options: SolverOptions) -> str:
    if not options.parts.per_modality:
        return "none"
    if isinstance(options.rank, str):
        rank = "rank chosen for each linear"
    elif isinstance(options.rank, float):
        rank = f"rank {100 * options.rank:g} % of min(N, K)"
    else:
        rank = f"rank {options.rank}"
    return f"{rank}, {options.low_rank_bits} bits"


def _modality_weights(options: SolverOptions) -> dict[str, str]:
    weights = options.modality_weights or {}
    if not weights:
        return {}
    return {
        "weights of the modalities": ", ".join(
            f"{name} {weight:.3g}" for name, weight in weights.items()
        )
    }


def _parts(recipe: Recipe) -> Table:
    total = sum(recipe_bytes(recipe).values(), LayerBytes())
    rows = [(name, getattr(total, part)) for part, name in PART_NAMES.items()] + [
        ("all", total.total),
        ("dense, bfloat16", total.bfloat16),
    ]
    return Table(
        "Memory of the linears' weights, part by part",
        (Column("part", number=False), Column("size"), Column("of bfloat16")),
        tuple(
            (
                Cell(name),
                Cell(byte_size(size), title=f"{size} bytes"),
                Cell(percent(size / total.bfloat16 if total.bfloat16 else None)),
            )
            for name, size in rows
        ),
    )


def _factors(recipe: Recipe) -> Table:
    groups = shared_inputs(recipe)
    path, short = short_names(list(groups))
    rows = []
    for label, (first, linears) in zip(short, groups.items()):
        factor = recipe.layers[first].smoothing_factor.double()
        for index, values in enumerate(factor):
            one = factor.shape[0] == 1
            spread, ratio = Quantiles.of(values), Quantiles.of(values / factor[0])
            rows.append(
                (
                    Cell(label, title=joined([n.rpartition(".")[2] for n in linears])),
                    Cell("all" if one else recipe.modalities[index]),
                    Cell(amount(spread.least)),
                    Cell(amount(spread.median)),
                    Cell(amount(spread.most)),
                    Cell(MISSING if index == 0 else amount(ratio.least)),
                    Cell(MISSING if index == 0 else amount(ratio.median)),
                    Cell(MISSING if index == 0 else amount(ratio.most)),
                )
            )
    return Table(
        "Smoothing factors over the channels of each input"
        + (f", in {path}" if path else ""),
        (
            Column("first linear that reads it", number=False),
            Column("modality", number=False),
            *(Column(name, "factor") for name in ("least", "median", "most")),
            *(
                Column(name, f"ratio to {recipe.modalities[0]}")
                for name in ("least", "median", "most")
            ),
        ),
        tuple(rows),
        folded=True,
    )


def _layers(recipe: Recipe) -> Table:
    path, short = short_names(list(recipe.layers))
    sizes = recipe_bytes(recipe)
    others = recipe.modalities[1:]
    rows = []
    for label, (name, layer) in zip(short, recipe.layers.items()):
        ranks = layer.ranks or (0,) * len(others)
        size = sizes[name]
        rows.append(
            (
                Cell(label),
                Cell(" × ".join(str(size) for size in layer.shape)),
                *(Cell(str(rank)) for rank in ranks),
                *(Cell(byte_size(getattr(size, part))) for part in PART_NAMES),
                Cell(byte_size(size.total)),
                Cell(
                    percent(
                        size.total / size.bfloat16 if size.bfloat16 else None, ".0f"
                    )
                ),
            )
        )
    return Table(
        "Ranks and memory of each linear" + (f", in {path}" if path else ""),
        (
            Column("linear", number=False),
            Column("N × K"),
            *(Column(modality, "rank of the pair") for modality in others),
            *(Column(name, "memory") for name in PART_NAMES.values()),
            Column("all", "memory"),
            Column("of bfloat16", "memory"),
        ),
        tuple(rows),
        folded=True,
    )
