# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a page is made of, before it is HTML."""

from dataclasses import dataclass
from typing import Iterable, Optional, Sequence, Union

from torchao_masquant.figures.drawing import Drawing

__all__ = ["Cell", "Section", "Table"]


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
        columns: heading that neighbours share ("" for none), and their own headings.
        rows: cells, or the texts of those that are nothing else.
        texts: how many columns, the first ones, hold texts; the others hold numbers.
        folded: whether the page shows it only on demand.
    """

    caption: str
    columns: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Sequence[Union[Cell, str]]]
    texts: int = 1
    folded: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        return [[Cell(c) if isinstance(c, str) else c for c in r] for r in self.rows]

    @property
    def titles(self) -> list[str]:
        return [title for _, titles in self.columns for title in titles]


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
        tables: Iterable[Table] = (),
        notes: Iterable[str] = (),
    ) -> "Section":
        """A section without what has nothing to show."""
        drawn = tuple(figure for figure in figures if figure is not None)
        said = tuple(note for note in notes if note)
        return cls(name, title, lead, drawn, tuple(tables), said)
