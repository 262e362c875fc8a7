# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Files that are still there after a crash of the process or of the machine."""

import contextlib
import os
from pathlib import Path
from typing import Iterator

from torchao_masquant.replacing import replacing

__all__ = ["durable", "sync_folder"]


@contextlib.contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, synced and renamed to it at the end.

    Whoever sees a file at ``path`` afterwards, sees all of it, also after a loss of power.
    """
    with replacing(path) as temporary:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
