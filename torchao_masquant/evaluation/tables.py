# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tables for people."""

import io
import sys
from typing import Any, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

__all__ = ["WIDTH", "new_table", "number", "short_names", "to_text"]

#: columns of a terminal that texts are laid out for; tables take what they need
WIDTH = 120


def new_table(title: str, text_columns: Sequence[str], columns: Sequence[str]) -> Table:
    """An empty table: texts on the left, numbers on the right."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in text_columns:
        table.add_column(name, no_wrap=True, min_width=len(name))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: Any, pattern: str = ".3f", factor: float = 1.0) -> str:
    """A number as a cell: empty for None."""
    return "" if value is None else format(factor * value, pattern)


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """Names of modules without the dotted path that all of them begin with.

    Returns:
        The path ("" for none), and what is left of each name.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    # The last part is never shared: something of each name is left.
    while parts and all(
        len(p) > shared + 1 and p[: shared + 1] == parts[0][: shared + 1] for p in parts
    ):
        shared += 1
    path = ".".join(parts[0][:shared]) if parts else ""
    return path, [".".join(p[shared:]) for p in parts]


def to_text(renderable: RenderableType) -> str:
    """What a terminal would show that is wide enough for all tables, without colours."""
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, no_color=True, force_terminal=False)
    console.width = max(WIDTH, _width(console, renderable))
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _width(console: Console, renderable: RenderableType) -> int:
    """Columns that no table has to shorten a cell for."""
    if isinstance(renderable, Group):
        return max(
            (_width(console, part) for part in renderable.renderables), default=0
        )
    if not isinstance(renderable, Table):
        return 0
    unbounded = console.options.update(max_width=sys.maxsize)
    return console.measure(renderable, options=unbounded).maximum
