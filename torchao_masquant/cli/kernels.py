# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``kernels``: what the Triton kernels compile to, with no GPU."""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from typing import TYPE_CHECKING

from torchao_masquant.cli.calibration_options import whole

if TYPE_CHECKING:
    from rich.table import Table

    from torchao_masquant.kernels.aot import Compiled

__all__ = ["add_arguments", "as_json", "main", "table"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--target",
        action="append",
        choices=("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"),
        help="compile for this architecture; give it again for another (default: all)",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="WORDS",
        help="only kernels whose name has these words in it, as in 'int_linear w4'; "
        "give it again for others",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of each form of a kernel only the largest and the smallest tile",
    )
    parser.add_argument(
        "--jobs",
        type=whole(0),
        default=0,
        metavar="N",
        help="processes that compile (default: one a core)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the table as JSON, for scripts",
    )


def main(arguments: argparse.Namespace) -> int:
    """Compile, print one table, and say what is wrong.

    Returns:
        0 where every kernel is sound, 1 where one is not.

    Raises:
        ValueError: there is nothing to compile.
    """

    from torchao_masquant.evaluation.tables import to_text
    from torchao_masquant.kernels.aot import (
        TARGETS,
        case_names,
        compile_all,
        extremes,
    )
    from torchao_masquant.progress import progress_bar

    names = case_names(arguments.target or tuple(TARGETS), arguments.kernel)
    if arguments.quick:
        names = extremes(names)
    ready = progress_bar(
        compile_all(names, arguments.jobs), "compiling", len(names), unit="kernel"
    )
    found = {(compiled.target, compiled.kernel): compiled for compiled in ready}
    rows = [found[name.target, name.case] for name in names]
    if arguments.json:
        print(as_json(rows))
    else:
        print(to_text(table(rows)))
    unsound = 0
    for row in rows:
        for problem in row.problems():
            unsound += 1
            print(f"{row.target}: {row.kernel} {problem}", file=sys.stderr)
    return 1 if unsound else 0


def table(rows: "list[Compiled]") -> "Table":
    """One line a target and kernel."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("target", "kernel"):
        shown.add_column(column, no_wrap=column == "target")
    for column in ("registers", "spills", "shared memory"):
        shown.add_column(column, justify="right")
    shown.add_column("matrix instruction")
    for row in rows:
        shown.add_row(
            row.target,
            row.kernel,
            *map(str, (row.registers, row.spills, row.shared_memory)),
            row.error or ", ".join(_brief(name) for name, _ in row.matrix) or "none",
        )
    return shown


def _brief(instruction: str) -> str:
    # Every one of them is aligned, and what is left still tells shapes and types.
    for part in (".sync", ".aligned", ".row", ".col", ".satfinite"):
        instruction = instruction.replace(part, "")
    return instruction


def as_json(rows: "list[Compiled]") -> str:
    """The table, a line each, with the version of Triton that compiled it."""
    lines = ",\n".join(
        json.dumps({**dataclasses.asdict(row), "matrix": dict(row.matrix)})
        for row in rows
    )
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"triton": {version}, "kernels": [\n{lines}\n]}}'
