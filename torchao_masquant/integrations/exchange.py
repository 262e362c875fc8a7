# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Two folders that trade places."""

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["exchange"]

# <linux/fs.h> and <fcntl.h>
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def exchange(new: Path, target: Path, old: Path) -> None:
    """Give ``new`` the name ``target``, and what was there another one.

    On Linux in one step, after which ``new`` is the old folder: whoever looks, or is
    killed, finds a whole folder at ``target``. In two where the system cannot: the old
    one is at ``old`` between them, and afterwards.

    Args:
        new: a folder.
        target: a folder of the same file system.
        old: a name that is free.

    Raises:
        OSError: the system refuses; ``target`` is as it was.
    """
    if _exchange_at_once(new, target):
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


def _exchange_at_once(new: Path, target: Path) -> bool:
    """Whether this system, and this file system, could do it."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = [os.fsencode(path) for path in (new, target)]
    return renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
