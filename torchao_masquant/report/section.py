# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a page is made of, before it is HTML."""

from dataclasses import dataclass
from typing import Iterable, Optional

from torchao_masquant.figures.drawing import Drawing

__all__ = ["Cell", "Column", "Section", "Table"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        group: heading above it, shared with its neighbours; "" for none.
        number: whether it holds numbers.
    """

    title: str
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        tone: "bad" for a value that has to be noticed, or "".
        title: what the page says when it is pointed at.
        note: smaller, behind the text.
    """

    text: str
    tone: str = ""
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        caption: what it shows.
        columns: one for each cell of a row.
        rows: cells.
        folded: whether the page shows it only on demand.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns and how many of these each spans."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = column.group, found[-1][1] + 1
            else:
                found.append((column.group, 1))
        return found


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its id.
        title: its heading.
        lead: what it is about, one or two sentences.
        figures: that there was something to draw for.
        tables: below the figures.
        notes: what is missing in it, or has to be said beside it.
    """

    name: str
    title: str
    lead: str
    figures: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        title: str,
        lead: str,
        figures: Iterable[Optional[Drawing]] = (),
        tables: tuple[Table, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> "Section":
        """A section without what has nothing to show."""
        drawn = tuple(figure for figure in figures if figure is not None)
        return cls(name, title, lead, drawn, tables, tuple(n for n in notes if n))
