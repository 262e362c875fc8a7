# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Files and folders that are written whole or not at all.

What is new is made under a temporary name beside its target, and renamed at the end.
A link stays a link: what it leads to is replaced.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Iterator, Union

__all__ = ["move_folder", "replacing", "replacing_folder", "sync", "write_whole"]

# <linux/fs.h> and <fcntl.h>
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's place after the block.

    An exception inside leaves a file at ``path`` as it was, and nothing beside it. A
    process that is killed leaves the temporary file, too: ``.NAME.`` to ``.tmp``.

    Args:
        path: of the file; its folder is there.
        durable: whoever sees the new file sees all of it, also after a loss of power.
    """
    path = Path(os.path.realpath(path))
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_whole(
    path: Path, content: Union[str, bytes], *, durable: bool = False
) -> None:
    """Write a file as :func:`replacing` does; text is written in UTF-8."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder, which takes the place and the name of another after the block.

    An exception inside leaves ``path`` as it was. A process that is killed leaves a
    folder beside it, too: ``.NAME.`` and eight characters, to be deleted.

    Args:
        path: of the folder; made together with those around it where it is missing.
            What is in it and is to stay is for the caller to put into the new one.

    Raises:
        OSError: nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OSError(
            f"cannot write {os.fspath(path)!r}: {error.strerror or error}; give a "
            "folder that can be written."
        ) from error
    try:
        # Another folder inside: a temporary one is its owner's alone, whatever the
        # umask says, and what is written may ask what its folder is called.
        new = temporary / "new" / path.name
        new.mkdir(parents=True)
        yield new
        move_folder(new, path, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(new: Path, target: Path, old: Path) -> None:
    """Give a folder the name ``target``; what was there goes out of the way.

    On Linux in one step, after which ``new`` is the old folder: whoever looks, or is
    killed, finds a whole folder at ``target``. In two where the system cannot: the old
    one is at ``old`` between them, and afterwards.

    Args:
        new: a folder.
        target: a folder of the same file system, or a name that is free.
        old: a name that is free.

    Raises:
        OSError: the system refuses; ``target`` is as it was.
    """
    if not target.exists():
        os.rename(new, target)
        return
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


def sync(path: Path) -> None:
    """Make the content of a file last, or the renames and removals in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
