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

    def add(self, where: str, sentence: str) -> None:
        """Note a sentence about a row.

        Args:
            where: file and line of the row.
            sentence: the same one for all rows that it is about, without a full stop.
        """
        rows = self._rows.setdefault(sentence, [])
        if where not in rows[-1:]:
            rows.append(where)

    def say(self) -> None:
        """Log each sentence once, with the first row and the number of others."""
        for sentence, (first, *others) in self._rows.items():
            more = f" and {len(others)} more" if others else ""
            _LOGGER.warning("%s%s: %s.", first, more, sentence)
        self._rows.clear()
