# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What an analysis and evaluations say about the inside of a model."""

from dataclasses import replace
from typing import Sequence, Union

from torchao_masquant.evaluation import Analysis, Evaluation
from torchao_masquant.evaluation.analysis_figures import (
    compensation_drawings,
    modality_drawings,
)
from torchao_masquant.evaluation.evaluation_figures import kind_drawing, layer_drawing
from torchao_masquant.evaluation.tables import short_names
from torchao_masquant.report.section import Cell, Section, Table
from torchao_masquant.solver.modality_spread import sinks_of
from torchao_masquant.wording import MISSING, amount, method_name

__all__ = ["compensation_section", "layer_section", "modality_section"]

_WEAKEST = 10


def modality_section(analysis: Analysis, modalities: Sequence[str]) -> Section:
    """How the modalities differ.

    Args:
        analysis: of the dense model.
        modalities: all of the page, which give the colours.
    """
    figures = modality_drawings(analysis, modalities)
    note = ""
    if "theorem_1" not in {figure.name for figure in figures}:
        note = (
            f"{analysis.scheme} leaves activations as they are: there is no loss to "
            "predict. Analyze for a scheme such as w4a8 to see it."
        )
    return Section.of(
        "modalities",
        "How the modalities differ",
        f"Of the dense model, with the bits of {analysis.scheme} and alpha "
        f"{analysis.alpha:g}. The louder a modality, the coarser the steps on which a "
        "shared factor rounds the others.",
        figures,
        notes=(note, *sinks_of(analysis.spreads), analysis.verdict),
    )


def compensation_section(analysis: Analysis, modalities: Sequence[str]) -> Section:
    """How much of the difference a low-rank pair can repair."""
    return Section.of(
        "compensation",
        "What a low-rank pair repairs",
        f"All modalities share the weights that are smoothed for "
        f"{analysis.modalities[0]}; a pair for each other modality makes up for the "
        "difference.",
        compensation_drawings(analysis, modalities),
    )


def layer_section(
    evaluations: Sequence[tuple[str, Evaluation]],
    modalities: Sequence[str],
    scheme: str,
    method: str,
) -> Section:
    """Where quantization noise arises.

    Args:
        evaluations: method and evaluation, at least one of them with ratios.
        modalities: all of the page, which give the colours.
        scheme, method: of the model whose linears are shown one by one.
    """
    figures, tables = [layer_drawing(evaluations)], []
    chosen = [e for m, e in evaluations if e.sqnr and (e.scheme, m) == (scheme, method)]
    for evaluation in chosen[:1]:
        found = kind_drawing(evaluation, modalities)
        if found is not None:
            about = f"{found.title}, {scheme}, {method_name(method)}"
            figures.append(replace(found, title=about))
        tables.append(_weakest(method, evaluation))
    return Section.of(
        "layers",
        "Layer by layer",
        "The quantized model's linears on the dense model's inputs.",
        figures,
        tables,
    )


def _weakest(method: str, evaluation: Evaluation) -> Table:
    path, short = short_names(list(evaluation.sqnr))
    labels = dict(zip(evaluation.sqnr, short))
    ordered = sorted(
        (name for name, ratios in evaluation.sqnr.items() if ratios),
        key=lambda name: min(r.centered for r in evaluation.sqnr[name].values()),
    )
    rows: list[list[Union[Cell, str]]] = []
    for name in ordered[:_WEAKEST]:
        ratios = evaluation.sqnr[name]
        found = [ratios.get(modality) for modality in evaluation.modalities]
        rows.append(
            [
                Cell(labels[name], title=name),
                *(amount(r.centered, ".1f") if r else MISSING for r in found),
                *(amount(r.plain, ".1f") if r else MISSING for r in found),
            ]
        )
    return Table(
        f"The {len(rows)} linears with the least centred SQNR, {evaluation.scheme}, "
        f"{method_name(method)}" + (f", in {path}" if path else ""),
        [
            ("", ["linear"]),
            ("centred SQNR, dB", evaluation.modalities),
            ("plain SQNR, dB", evaluation.modalities),
        ],
        rows,
        folded=True,
    )
