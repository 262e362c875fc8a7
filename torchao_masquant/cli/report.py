# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``report``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchao_masquant.cli.models import read_paths
from torchao_masquant.cli.parser import add_output_options
from torchao_masquant.outputs import check_file, kind_of

if TYPE_CHECKING:
    from torchao_masquant.report.page import Report

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the report."""
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="RECIPE|FOLDER|JSON",
        help="a recipe, a JSON file of analyze, evaluate or a benchmark, or a folder "
        "with any of recipe.safetensors, analysis.json, evaluation*.json, "
        "results*.json, quality*.json, demo*.json; where an evaluation does not know "
        "its method, its file's name tells it, as in evaluation-w4a8-smoothquant.json",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="PATH",
        help="the page to write (default: %(default)s)",
    )
    parser.add_argument(
        "--title", help="heading of the page, in place of the model's name"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write the figures as PNG here"
    )
    add_output_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Write the report.

    Returns:
        Exit code.

    Raises:
        ImportError: a library that draws is missing.
        OSError: something is missing or cannot be written.
        ValueError: something is damaged.
    """
    from torchao_masquant.report.page import write_page
    from torchao_masquant.report.sources import read_sources
    from torchao_masquant.wording import byte_size, joined

    sources = read_sources(arguments.sources)
    check_file(
        arguments.output,
        "page",
        overwrite=arguments.overwrite,
        sources=read_paths(*arguments.sources),
    )
    if arguments.png is not None and arguments.png.is_dir():
        for path in arguments.png.glob("*.png"):
            if kind_of(path) == "figure":
                check_file(path, "figure", overwrite=arguments.overwrite)
    report = write_page(arguments.output, sources, arguments.title, arguments.png)
    if arguments.json:
        print(json.dumps(_as_json(report), indent=2))
        return 0
    print(f"Wrote {report.path} ({byte_size(report.nbytes)}).")
    if report.png:
        print(f"Wrote {len(report.png)} figures to {arguments.png}.")
    if report.missing:
        print(f"Without {joined(report.missing)}: the page says what makes them.")
    return 0


def _as_json(report: "Report") -> dict[str, Any]:
    return {
        "report": str(report.path),
        "bytes": report.nbytes,
        "sections": report.sections,
        "figures": report.figures,
        "missing": report.missing,
        "png": [str(path) for path in report.png],
    }
