# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The page: what it shows, and its file."""

import datetime
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence, Union

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.evaluation import Analysis, Evaluation
from torchao_masquant.figures.drawing import Drawing
from torchao_masquant.figures.export import to_svg, write_png
from torchao_masquant.figures.style import (
    COLORS,
    VARIABLES,
    modality_color,
    require,
)
from torchao_masquant.outputs import check_file
from torchao_masquant.recipe import Recipe
from torchao_masquant.report.headline import headline
from torchao_masquant.report.missing import missing_parts
from torchao_masquant.report.model_sections import (
    compensation_section,
    layer_section,
    modality_section,
)
from torchao_masquant.report.quality_section import quality_section
from torchao_masquant.report.recipe_section import recipe_section
from torchao_masquant.report.result_rows import rows_of_results
from torchao_masquant.report.rows import Rows, rows_of_evaluations
from torchao_masquant.report.section import Section
from torchao_masquant.report.sources import UNNAMED, Sources, told_apart

__all__ = ["Report", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"

Evaluations = Union[Mapping[str, Evaluation], Iterable[Evaluation]]


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: of the page.
        nbytes: of the page.
        sections: ids of its sections.
        figures: names of its figures.
        missing: what it had nothing for.
        png: files of the figures; () where none were asked for.
    """

    path: Path
    nbytes: int
    sections: tuple[str, ...]
    figures: tuple[str, ...]
    missing: tuple[str, ...]
    png: tuple[Path, ...] = ()


def write_report(
    path: Union[str, os.PathLike],
    *,
    recipe: Optional[Recipe] = None,
    analysis: Optional[Analysis] = None,
    evaluations: Evaluations = (),
    results: Optional[Any] = None,
    title: Optional[str] = None,
    png: Optional[Union[str, os.PathLike]] = None,
) -> Report:
    """Write one self-contained HTML page about how a model was quantized.

    Args:
        path: of the page; an earlier page of that name is replaced whole.
        recipe: how it was quantized.
        analysis: of the dense model.
        evaluations: of quantized models, best against the dense one; a mapping names
            the method of each, for those that do not know theirs.
        results: a benchmark's rows; see
            :func:`~torchao_masquant.report.result_rows.rows_of_results`.
        title: heading of the page; None for the model's name.
        png: folder for the figures as PNG files; made where it does not exist.

    Returns:
        What was written.

    Raises:
        ValueError: there is nothing to report; a row of ``results`` is damaged; a file
            that is no page or figure of ours is in the way.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the page or a figure cannot be written.
        ImportError: matplotlib or jinja2 is missing.
    """
    benchmarks = () if results is None else (("results", results),)
    sources = Sources(recipe, analysis, _named(evaluations), benchmarks)
    if sources == Sources():
        raise ValueError(
            "there is nothing to report: give a recipe, an analysis, an evaluation or "
            "results."
        )
    return write_page(Path(path), sources, title, None if png is None else Path(png))


def _named(evaluations: Evaluations) -> tuple[tuple[str, Evaluation], ...]:
    if isinstance(evaluations, Mapping):
        return tuple((e.method or name, e) for name, e in evaluations.items())
    return tuple((e.method or UNNAMED, e) for e in evaluations)


def write_page(
    path: Path, sources: Sources, title: Optional[str], png: Optional[Path]
) -> Report:
    """Write the page about some sources; see :func:`write_report`."""
    environment = _environment()
    _check_targets(path, png)
    sources = replace(sources, evaluations=told_apart(sources.evaluations))
    modalities = sources.modalities
    evaluated = rows_of_evaluations(sources.evaluations)
    benchmarks = _benchmark_rows(sources)
    top = headline(sources, evaluated, benchmarks, title)
    sections = [] if evaluated is None else [quality_section(evaluated, "evaluations")]
    sections += [
        quality_section(rows, f"results{index or ''}")
        for index, rows in enumerate(benchmarks)
    ]
    sections += _model_sections(sources, modalities, top.scheme, top.method)
    missing = missing_parts(sources)
    text = environment.get_template("page.html.j2").render(
        headline=top,
        sections=sections,
        missing=missing,
        made_from=sources.parts,
        made_on=datetime.date.today().isoformat(),
        modalities={m: VARIABLES[modality_color(m, modalities)] for m in modalities},
        colors=COLORS,
        to_svg=to_svg,
    )
    figures = [figure for section in sections for figure in section.figures]
    drawings = () if png is None else _write_drawings(figures, png)
    data = text.encode("utf-8", "replace")
    _write(path, data)
    return Report(
        path,
        len(data),
        tuple(section.name for section in sections),
        tuple(figure.name for figure in figures),
        tuple(part.name for part in missing),
        drawings,
    )


def _benchmark_rows(sources: Sources) -> list[Rows]:
    several = len(sources.results) > 1
    return [
        rows
        for name, data in sources.results
        for rows in rows_of_results(data, name if several else "")
    ]


def _environment() -> Any:
    require("jinja2", "matplotlib")
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _check_targets(path: Path, png: Optional[Path]) -> None:
    """Raise where the page or its figures cannot be, before they are made."""
    check_file(path, "page")
    if png is not None and png.exists() and not png.is_dir():
        raise NotADirectoryError(
            f"cannot write figures to {os.fspath(png)!r}: it is no folder."
        )


def _model_sections(
    sources: Sources, modalities: Sequence[str], scheme: str, method: str
) -> list[Section]:
    found = []
    if any(evaluation.sqnr for _, evaluation in sources.evaluations):
        found.append(layer_section(sources.evaluations, modalities, scheme, method))
    if sources.analysis is not None:
        found.append(modality_section(sources.analysis, modalities))
        if len(sources.analysis.modalities) > 1:
            found.append(compensation_section(sources.analysis, modalities))
    if sources.recipe is not None and sources.recipe.layers:
        found.append(recipe_section(sources.recipe, modalities))
    return found


def _write_drawings(figures: Sequence[Drawing], folder: Path) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{figure.name}.png" for figure in figures)
    for path in paths:
        check_file(path, "figure")
    for figure, path in zip(figures, paths):
        write_png(figure, path)
    return paths


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise OSError(
            f"cannot write {os.fspath(path)!r}: {error.strerror or error}."
        ) from error
