# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How far a long loop is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

__all__ = ["LogLines", "progress_bar"]

#: between two lines in a log, in seconds, and before the first
_INTERVAL = 30.0

_clock = time.monotonic


class LogLines(plain_tqdm):
    """tqdm for a file: whole lines, none of what is done within half a minute."""

    disable: bool

    def __init__(self, *args: Any, **options: Any):
        self._told = _clock()
        options.update(
            disable=bool(options.get("disable")),
            # Every step asks whether it is time for a line.
            miniters=1,
            mininterval=0,
            bar_format="{desc}{n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left",
        )
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> None:
        now = _clock()
        if now - self._told >= _INTERVAL:
            self._told = now
            meter = self.format_dict
            description = meter["prefix"].removesuffix(": ")
            meter["prefix"] = f"{description}: " if description else ""
            self.fp.write(f"{self.format_meter(**meter)}\n")
            self.fp.flush()

    def close(self) -> None:
        # Nothing is there to be wiped away.
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress_bar(*args: Any, show: bool = True, **options: Any) -> Any:
    """A ``tqdm``, on standard error.

    Args:
        *args: of tqdm: what to iterate over.
        show: a bar, or lines where standard error is no terminal; otherwise nothing.
        **options: of tqdm.
    """
    if not show or sys.stderr is None:
        return plain_tqdm(*args, disable=True, **options)
    return (tqdm if sys.stderr.isatty() else LogLines)(*args, **options)
