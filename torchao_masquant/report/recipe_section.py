# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a recipe says: options, memory, ranks and smoothing factors."""

from typing import Sequence, Union

from torchao_masquant.evaluation.tables import short_names
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.recipe_bytes import PART_NAMES, LayerBytes, recipe_bytes
from torchao_masquant.report.recipe_figures import (
    Quantiles,
    bytes_figure,
    ratio_figure,
    shared_inputs,
    smoothing_figure,
)
from torchao_masquant.report.section import Cell, Section, Table
from torchao_masquant.wording import (
    MISSING,
    amount,
    byte_size,
    joined,
    method_name,
    percent,
)

__all__ = ["recipe_section"]

_HEAD = "8 bits, its channels rotated and rounded to nearest"

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
    options, bits = recipe.options, recipe.options.number_format
    group = "output channel"
    if bits.group_size is not None:
        group = f"{bits.group_size} neighbours in an output channel"
    activations = "not quantized"
    if not bits.weight_only:
        activations = f"{bits.act_bits} bits, one scale per token"
        if bits.act_format is not None:
            activations = f"floats, {bits.act_format}"
            if options.budget and bits.has_own_groups:
                activations = "floats, in the format of the weights that they meet"
        if options.procedure.shift:
            activations += ", less each modality's mean"
    symmetry = "symmetric" if bits.symmetric else "asymmetric"
    weights = f"{bits.weight_bits} bits, {symmetry}"
    if bits.weight_format is not None:
        weights = f"floats, {bits.weight_format}"
    if options.budget:
        weights = (
            f"chosen for each input, {options.budget} with all that goes with them, "
            f"{symmetry}"
        )
        group = "output channel, or group of neighbours in one"
    rounding = _ROUNDINGS[options.procedure.rounding]
    if options.procedure.clip:
        rounding += ", of a clipped range where that errs less"
    if options.asymmetric_calibration:
        rounding += ", and by what was quantized before (asymmetric calibration)"
    values = {
        "scheme": options.scheme,
        "method": method_name(options.method),
        "weights": f"{weights}, one scale per {group}",
        "rounding of the weights": rounding,
        "activations": activations,
        "alpha": _choice(options.alphas, options.procedure.smooth),
        "separation of the modalities": _choice(
            options.separations, options.procedure.per_modality
        ),
        "low-rank pairs": _pairs(options),
        **_modality_weights(options),
        **({"output head": _HEAD} if options.head_bits == 8 else {}),
        "modalities": f"{joined(recipe.modalities)} (base: {recipe.modalities[0]})",
        "linears": str(len(recipe.layers)),
        **{f"made with {name}": version for name, version in recipe.versions.items()},
    }
    return Table(
        "Options of the recipe",
        [("", ["option", "value"])],
        list(values.items()),
        texts=2,
    )


def _choice(values: Sequence[float], used: bool) -> str:
    if not used:
        return "not used"
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(texts) == 1 else f"for each input, one of {joined(texts)}"


def _pairs(options: SolverOptions) -> str:
    if not options.procedure.per_modality:
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
        [("", ["part", "size", "of bfloat16"])],
        [
            [name, Cell(byte_size(size), title=f"{size} bytes"), _share(size, total)]
            for name, size in rows
        ],
    )


def _share(size: int, of: LayerBytes, pattern: str = ".1f") -> str:
    return percent(size / of.bfloat16 if of.bfloat16 else None, pattern)


def _factors(recipe: Recipe) -> Table:
    groups = shared_inputs(recipe)
    path, short = short_names(list(groups))
    rows: list[list[Union[Cell, str]]] = []
    for label, (first, linears) in zip(short, groups.items()):
        factor = recipe.layers[first].smoothing_factor.double()
        for index, values in enumerate(factor):
            spread, ratio = Quantiles.of(values), Quantiles.of(values / factor[0])
            rows.append(
                [
                    Cell(label, title=joined([n.rpartition(".")[2] for n in linears])),
                    "all" if factor.shape[0] == 1 else recipe.modalities[index],
                    *map(amount, (spread.least, spread.median, spread.most)),
                    *(
                        amount(value) if index else MISSING
                        for value in (ratio.least, ratio.median, ratio.most)
                    ),
                ]
            )
    ends = ["least", "median", "most"]
    return Table(
        "Smoothing factors over the channels of each input"
        + (f", in {path}" if path else ""),
        [
            ("", ["first linear that reads it", "modality"]),
            ("factor", ends),
            (f"ratio to {recipe.modalities[0]}", ends),
        ],
        rows,
        texts=2,
        folded=True,
    )


def _layers(recipe: Recipe) -> Table:
    path, short = short_names(list(recipe.layers))
    sizes = recipe_bytes(recipe)
    others = recipe.modalities[1:]
    rows: list[list[Union[Cell, str]]] = []
    for label, (name, layer) in zip(short, recipe.layers.items()):
        size = sizes[name]
        rows.append(
            [
                label,
                " × ".join(map(str, layer.shape)),
                *map(str, layer.ranks or (0,) * len(others)),
                *(byte_size(getattr(size, part)) for part in PART_NAMES),
                byte_size(size.total),
                _share(size.total, size, ".0f"),
            ]
        )
    return Table(
        "Ranks and memory of each linear" + (f", in {path}" if path else ""),
        [
            ("", ["linear", "N × K"]),
            ("rank of the pair", others),
            ("memory", [*PART_NAMES.values(), "all", "of bfloat16"]),
        ],
        rows,
        folded=True,
    )
