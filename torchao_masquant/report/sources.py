# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a page is made from, and where it is found."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence, TypeVar, Union

from torchao_masquant.evaluation import Analysis, Evaluation
from torchao_masquant.figures.style import method_order
from torchao_masquant.options import METHODS, SCHEMES
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.result_rows import rows_of_results

__all__ = [
    "ANALYSIS",
    "EVALUATIONS",
    "RECIPE",
    "RESULTS",
    "UNNAMED",
    "Sources",
    "read_sources",
    "told_apart",
]

#: what an evaluation is called whose method nobody knows
UNNAMED = "method not named"

_Found = TypeVar("_Found")

#: names of the files in a folder
RECIPE = "recipe.safetensors"
ANALYSIS = "analysis.json"
EVALUATIONS = "evaluation*.json"
RESULTS = ("results*.json", "quality*.json", "demo*.json")

_NAMES = (
    f"{RECIPE}, {ANALYSIS}, {EVALUATIONS}, {', '.join(RESULTS[:-1])} or {RESULTS[-1]}"
)


@dataclass(frozen=True)
class Sources:
    """Whatever there is.

    Attributes:
        recipe: None where there is none; the same for the analysis.
        analysis: of the dense model.
        evaluations: method and evaluation.
        results: name and content of parsed benchmark files.
    """

    recipe: Optional[Recipe] = None
    analysis: Optional[Analysis] = None
    evaluations: tuple[tuple[str, Evaluation], ...] = ()
    results: tuple[tuple[str, Any], ...] = ()

    @property
    def modalities(self) -> list[str]:
        """All that occur, base first."""
        evaluated = [evaluation for _, evaluation in self.evaluations]
        found = [part for part in (self.recipe, self.analysis, *evaluated) if part]
        return list(dict.fromkeys(name for part in found for name in part.modalities))

    @property
    def parts(self) -> list[str]:
        """What there is, in words."""
        count = len(self.evaluations)
        told = {
            "a recipe": self.recipe is not None,
            "an analysis": self.analysis is not None,
            f"{count} evaluation{'s' if count > 1 else ''}": count,
            "benchmark results": self.results,
        }
        return [name for name, there in told.items() if there]


def read_sources(paths: Sequence[Union[str, os.PathLike]]) -> Sources:
    """Read recipes, JSON files, and what folders hold.

    Args:
        paths: files, which tell by their content what they are, and folders, of which
            files named as above are read.

    Raises:
        FileNotFoundError: there is no such file, or a folder has none of them.
        ValueError: a file is damaged, or there are two recipes or analyses; names them.
        OSError: a file cannot be read.
    """
    files = [file for path in paths for file in _files(Path(path))]
    recipe: Optional[Recipe] = None
    analysis: Optional[Analysis] = None
    evaluations, results = [], []
    for file in dict.fromkeys(files):
        found = _read(file)
        if isinstance(found, Recipe):
            recipe = _only(recipe, found, "recipe", file)
        elif isinstance(found, Analysis):
            analysis = _only(analysis, found, "analysis", file)
        elif isinstance(found, Evaluation):
            evaluations.append((_method(file, found), found))
        else:
            results.append((file.stem, found))
    return Sources(recipe, analysis, tuple(evaluations), tuple(results))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {os.fspath(path)!r}: give a recipe, a JSON file, or a folder "
            f"with {_NAMES}."
        )
    if not path.is_dir():
        return [path]
    patterns = (RECIPE, ANALYSIS, EVALUATIONS, *RESULTS)
    found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    if not found:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} holds nothing to report: it needs {_NAMES}."
        )
    return found


def _only(before: Optional[_Found], found: _Found, kind: str, file: Path) -> _Found:
    if before is not None:
        raise ValueError(
            f"{os.fspath(file)!r} is a second {kind}: a report is about one."
        )
    return found


def _read(path: Path) -> Any:
    """A recipe, an analysis, an evaluation, or a benchmark's content."""
    if path.suffix.lower() != ".json":
        return Recipe.load(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind = data.get("format") if isinstance(data, dict) else None
        if path.name == ANALYSIS or kind == Analysis.FORMAT:
            return Analysis.from_json(data)
        if path.match(EVALUATIONS) or kind == Evaluation.FORMAT:
            return Evaluation.from_json(data)
        rows_of_results(data)
        return data
    # Wrong text and wrong JSON are ValueErrors too.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is damaged, or something else: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."


def _method(path: Path, evaluation: Evaluation) -> str:
    """The method as the evaluation tells it, else one of ours that its file's name ends
    with, as in evaluation-w4a8-smoothquant.json.
    """
    if evaluation.method is not None:
        return evaluation.method
    # The longest first: "masquant-paper" ends with no other, and others may.
    known = sorted(METHODS, key=len, reverse=True)
    return next((m for m in known if _ends_with(path.stem, m)), UNNAMED)


def _ends_with(stem: str, method: str) -> bool:
    before = stem.removesuffix(method)
    return before != stem and not before[-1:].isalnum()


def told_apart(
    evaluations: Sequence[tuple[str, Evaluation]],
) -> tuple[tuple[str, Evaluation], ...]:
    """Evaluations by scheme and method, those of the same two numbered."""
    schemes = [None, *SCHEMES]
    evaluations = sorted(
        evaluations,
        key=lambda pair: (
            schemes.index(pair[1].scheme)
            if pair[1].scheme in schemes
            else len(schemes),
            pair[1].scheme or "",
            method_order(pair[0]),
        ),
    )
    counts = Counter((m, e.scheme) for m, e in evaluations)
    seen: Counter = Counter()
    found = []
    for method, evaluation in evaluations:
        key = method, evaluation.scheme
        seen[key] += 1
        numbered = counts[key] > 1 and evaluation.scheme is not None
        found.append((f"{method} ({seen[key]})" if numbered else method, evaluation))
    return tuple(found)
