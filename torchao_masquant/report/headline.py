# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The numbers at the top of the page."""

from dataclasses import dataclass
from typing import Optional, Sequence

from torchao_masquant.report.facts import facts
from torchao_masquant.report.recipe_bytes import LayerBytes, recipe_bytes
from torchao_masquant.report.rows import Row, Rows
from torchao_masquant.report.sources import Sources
from torchao_masquant.wording import (
    byte_size,
    method_name,
    percent,
    points,
)

__all__ = ["NOTICED", "Headline", "Number", "fell", "headline"]


@dataclass(frozen=True)
class Number:
    """One of the large numbers.

    Attributes:
        label: what it is.
        value: the number.
        note: what it has to be compared with.
        tone: "bad" for a value that has to be noticed, or "".
        share: 0..1, for a bar below it; None for no bar.
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""
    share: Optional[float] = None


@dataclass(frozen=True)
class Headline:
    """What the top of the page says.

    Attributes:
        title: heading of the page.
        subtitle: model, scheme and method in words.
        scheme, method: of the model that the numbers are for; "" where none is.
        facts: what the page is about: what was measured, on what and when.
        numbers: memory, and accuracy on each task.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    scheme: str
    method: str
    numbers: tuple[Number, ...]


#: A fall of accuracy by more than this has to be noticed.
NOTICED = 0.02


def fell(value: float, before: float) -> bool:
    """Whether accuracy fell by more than :data:`NOTICED`; not by 0.98 - 0.96 itself."""
    return before - value > NOTICED + 1e-9


def headline(
    sources: Sources,
    evaluated: Optional[Rows],
    benchmarks: Sequence[Rows],
    title: Optional[str],
) -> Headline:
    """Choose the model that the page is about, and its numbers.

    It is the recipe's; without a recipe, the last one that "masquant" quantized, or
    the last quantized one.

    Args:
        sources: all that there is.
        evaluated: models that were evaluated.
        benchmarks: models in benchmark files. Where these hold several groups, it is
            not known which of them the recipe's model belongs to, and none is used.
        title: of the page, in place of the model's name.
    """
    groups = [] if evaluated is None else [evaluated]
    if len(benchmarks) == 1:
        groups += benchmarks
    row, dense = _chosen(sources, groups)
    scheme, method = (row.scheme, row.method) if row is not None else ("", "")
    numbers: list[Number] = []
    if sources.recipe is not None:
        scheme, method = sources.recipe.scheme, sources.recipe.options.method
        total = sum(recipe_bytes(sources.recipe).values(), LayerBytes())
        numbers.append(_memory(total.total, total.bfloat16, "{} in bfloat16"))
    if row is not None:
        if sources.recipe is None and row.weight_bytes is not None:
            of = None if dense is None else dense.weight_bytes
            numbers.append(_memory(row.weight_bytes, of, "the dense model's {}"))
        numbers += [_accuracy(row, dense, task) for task in row.accuracy]
    model = _model(sources)
    named = [f"{scheme}, {method_name(method)}"] if scheme else []
    if sources.recipe is not None:
        named.append(f"{len(sources.recipe.layers)} linears")
    return Headline(
        title=title or model or "Quantization report",
        subtitle=" · ".join(([model] if title and model else []) + named),
        facts=facts(sources),
        scheme=scheme,
        method=method,
        numbers=tuple(numbers),
    )


def _model(sources: Sources) -> str:
    if sources.analysis is not None:
        return sources.analysis.model
    return sources.evaluations[0][1].model if sources.evaluations else ""


def _chosen(
    sources: Sources, groups: Sequence[Rows]
) -> tuple[Optional[Row], Optional[Row]]:
    """The model that the page is about, and the dense one of the same source."""
    found = [(row, rows.dense) for rows in groups for row in rows.drawn]
    if sources.recipe is not None:
        options = sources.recipe.options
        wanted = options.scheme, options.method
        found = [pair for pair in found if (pair[0].scheme, pair[0].method) == wanted]
        return found[0] if found else (None, None)
    ours = [pair for pair in found if pair[0].method == "masquant"]
    chosen = ours or found
    return chosen[-1] if chosen else (None, None)


def _memory(size: int, of: Optional[int], what: str) -> Number:
    share = size / of if of else None
    note = f"{percent(share, '.0f')} of {what.format(byte_size(of))}" if share else ""
    return Number("weights of its linears", byte_size(size), note, share=share)


def _accuracy(row: Row, dense: Optional[Row], task: str) -> Number:
    value = row.accuracy[task]
    count = row.examples.get(task)
    label = f"{task}, right answers" + (f" of {count}" if count else "")
    if dense is None or task not in dense.accuracy:
        return Number(label, percent(value))
    before = dense.accuracy[task]
    return Number(
        label,
        percent(value),
        f"dense {percent(before)}, {points(value - before)}",
        tone="bad" if fell(value, before) else "",
    )
