# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a page is about: which model, calibrated and evaluated on what, and when."""

from typing import Any, Mapping

from torchao_masquant.report.sources import Sources
from torchao_masquant.wording import joined

__all__ = ["facts"]


def facts(sources: Sources) -> tuple[tuple[str, str], ...]:
    """Name and text of each, as far as it is known.

    Args:
        sources: of the page.
    """
    found = {
        "Model": _model(sources),
        "Calibrated on": _calibration(sources),
        "Evaluated on": _evaluations(sources),
    }
    return tuple((name, text) for name, text in found.items() if text)


def _description(sources: Sources) -> Mapping[str, Any]:
    return {} if sources.recipe is None else sources.recipe.description


def _model(sources: Sources) -> str:
    names = [_description(sources).get("model")]
    names += [evaluation.name for _, evaluation in sources.evaluations]
    return joined(list(dict.fromkeys(str(name) for name in names if name)))


def _calibration(sources: Sources) -> str:
    about = _description(sources)
    samples, tokens = about.get("samples"), about.get("tokens")
    parts = [str(about["data"])] if about.get("data") else []
    if samples:
        parts.append(f"{samples} samples")
    if isinstance(tokens, Mapping) and tokens:
        each = [f"{count:,} {modality}" for modality, count in tokens.items()]
        parts.append(f"{joined(each)} tokens")
    return ", ".join(parts)


def _evaluations(sources: Sources) -> str:
    """The tasks by their number of examples, and the days."""
    evaluations = [evaluation for _, evaluation in sources.evaluations]
    counts = {t: score.examples for e in evaluations for t, score in e.tasks.items()}
    groups: dict[int, list[str]] = {}
    for task, examples in counts.items():
        groups.setdefault(examples, []).append(task)
    texts = [
        f"{examples} examples {'each ' if len(tasks) > 1 else ''}of {joined(tasks)}"
        for examples, tasks in groups.items()
    ]
    days = sorted({e.date for e in evaluations if e.date})
    if days:
        texts.append(" to ".join(dict.fromkeys((days[0], days[-1]))))
    return ", ".join(texts)
