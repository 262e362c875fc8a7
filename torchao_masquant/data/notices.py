# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a reader of data has to be told, once for each data set."""

import logging

__all__ = ["Notices"]

_LOGGER = logging.getLogger(__name__)


class Notices:
    """Sentences about rows, gathered while the data is read and said at its end."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}
        self._unread: dict[str, list[str]] = {}

    def add(self, where: str, sentence: str) -> None:
        """Note a sentence about a row.

        Args:
            where: file and line of the row.
            sentence: the same one for all rows that it is about, without a full stop.
        """
        _note(self._rows, sentence, where)

    def unread(self, where: str, what: str) -> None:
        """Note what a row has and nothing reads, such as the name of a column."""
        _note(self._unread, what, where)

    def say(self) -> None:
        """Log each sentence once, and all that is not read in one."""
        for sentence, rows in self._rows.items():
            _LOGGER.warning("%s: %s.", _rows_of(rows), sentence)
        if self._unread:
            named = [
                f"{what} ({_rows_of(rows)})" for what, rows in self._unread.items()
            ]
            _LOGGER.warning("columns and keys that are not read: %s.", "; ".join(named))
        self._rows.clear()
        self._unread.clear()


def _note(found: dict[str, list[str]], what: str, where: str) -> None:
    rows = found.setdefault(what, [])
    if where not in rows[-1:]:
        rows.append(where)


def _rows_of(rows: list[str]) -> str:
    first, *others = rows
    return f"{first} and {len(others)} more" if others else first
