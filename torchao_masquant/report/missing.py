# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a page could show but has nothing for, and what makes it."""

from dataclasses import dataclass

from torchao_masquant.report.sources import ANALYSIS, RECIPE, Sources

__all__ = ["Missing", "missing_parts"]


@dataclass(frozen=True)
class Missing:
    """Something that is not there.

    Attributes:
        name: what kind of file it is.
        shows: what the page would show.
        command: what writes the file.
    """

    name: str
    shows: str
    command: str


def missing_parts(sources: Sources) -> list[Missing]:
    """Everything that could be there and is not."""
    recipe, evaluations = sources.recipe, sources.evaluations
    scheme = "w4a8" if recipe is None else recipe.scheme
    method = "masquant" if recipe is None else recipe.options.method
    calibrate = f'calibrate(model, samples, scheme="{scheme}").save("FOLDER/{RECIPE}")'
    analyze = f'analyze(model, samples, scheme="{scheme}").save("FOLDER/{ANALYSIS}")'
    evaluate = (
        "evaluate(quantized, data, reference=model)"
        f'.save("FOLDER/evaluation-{scheme}-{method}.json")'
    )
    by_layer = "signal-to-noise ratio by layer"
    found = []
    if recipe is None:
        shows = "options, memory part by part, ranks, smoothing factors by layer"
        found.append(Missing("recipe", shows, calibrate))
    elif not recipe.layers:
        shows = "memory, ranks and smoothing factors"
        found.append(Missing("linears in the recipe", shows, calibrate))
    if sources.analysis is None:
        shows = (
            "activation ranges, who decides the unified factor, theorem 1, "
            "effective ranks, signal-to-noise ratio by rank"
        )
        found.append(Missing("analysis", shows, analyze))
    if not evaluations:
        shows = f"accuracy against the dense model, {by_layer}"
        found.append(Missing("evaluations", shows, evaluate))
    elif not any(evaluation.sqnr for _, evaluation in evaluations):
        name = "evaluation against the dense model"
        found.append(Missing(name, by_layer, evaluate))
    if not sources.results:
        shows = "memory and quality of every scheme and method"
        command = "python -m torchao_masquant demo --json FOLDER/results.json"
        found.append(Missing("benchmark results", shows, command))
    return found
