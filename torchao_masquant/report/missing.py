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
    found = []
    scheme = "w4a8" if sources.recipe is None else sources.recipe.scheme
    method = "masquant" if sources.recipe is None else sources.recipe.options.method
    if sources.recipe is None:
        found.append(
            Missing(
                "recipe",
                "options, memory part by part, ranks, smoothing factors by layer",
                f'calibrate(model, samples, scheme="{scheme}").save("FOLDER/{RECIPE}")',
            )
        )
    elif not sources.recipe.layers:
        found.append(
            Missing(
                "linears in the recipe",
                "memory, ranks and smoothing factors",
                f'calibrate(model, samples, scheme="{scheme}").save("FOLDER/{RECIPE}")',
            )
        )
    if sources.analysis is None:
        found.append(
            Missing(
                "analysis",
                "activation ranges, who decides the unified factor, theorem 1, "
                "effective ranks, signal-to-noise ratio by rank",
                f'analyze(model, samples, scheme="{scheme}").save("FOLDER/{ANALYSIS}")',
            )
        )
    evaluate = (
        "evaluate(quantized, data, reference=model)"
        f'.save("FOLDER/evaluation-{scheme}-{method}.json")'
    )
    if not sources.evaluations:
        found.append(
            Missing(
                "evaluations",
                "accuracy against the dense model, signal-to-noise ratio by layer",
                evaluate,
            )
        )
    elif not any(evaluation.sqnr for _, evaluation in sources.evaluations):
        found.append(
            Missing(
                "evaluation against the dense model",
                "signal-to-noise ratio by layer",
                evaluate,
            )
        )
    if not sources.results:
        found.append(
            Missing(
                "benchmark results",
                "memory and quality of every scheme and method",
                "python -m torchao_masquant demo --json FOLDER/results.json",
            )
        )
    return found
