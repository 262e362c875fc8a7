# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the Triton kernels compile to, with no GPU.

    python tools/compile_kernels.py [--quick] [--target sm_90] [--kernel WORDS] [--json]

Every kernel in every tiling is compiled for several architectures. A line of each tells
registers, spills, shared memory and matrix instructions.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from typing import Optional, Sequence

from ahead_of_time import TARGETS, Compiled, case_names, compile_all, extremes
from rich import box
from rich.table import Table

from torchao_masquant.evaluation.tables import to_text
from torchao_masquant.progress import progress_bar


def _parsed(words: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--target",
        action="append",
        choices=TARGETS,
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
        type=int,
        default=0,
        metavar="N",
        help="processes that compile (default: one a core)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the table as JSON, for scripts",
    )
    return parser.parse_args(words)


def main(words: Optional[Sequence[str]] = None) -> int:
    """Compile, print one table, and say what is wrong.

    Returns:
        0 where every kernel is sound, 1 where one is not.

    Raises:
        ValueError: there is nothing to compile.
    """
    arguments = _parsed(words)
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


def table(rows: list[Compiled]) -> Table:
    """One line a target and kernel."""
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


def as_json(rows: list[Compiled]) -> str:
    """The table, a line each, with the version of Triton that compiled it."""
    lines = ",\n".join(
        json.dumps({**dataclasses.asdict(row), "matrix": dict(row.matrix)})
        for row in rows
    )
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"triton": {version}, "kernels": [\n{lines}\n]}}'


if __name__ == "__main__":
    sys.exit(main())
