# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where a medium is: a file, an address, data in base64, or a value of Python's."""

import base64
import binascii
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Mapping, Optional
from urllib.parse import unquote, urlsplit

from torchao_masquant.data.parts import IMAGE, VIDEO, short

__all__ = ["located"]

_WEB = ("http://", "https://")
_TIMEOUT = 60.0

# What a dict calls the medium that it holds, the first that is there: as `datasets`
# has a medium that it has not decoded, and as parts of messages write one.
_ENCODED = ("data", "base64")
_PLACES = ("url", "path", "file", "src")

# No path: these have a dot before their extension.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def located(value: Any, kind: str, where: str, folder: Optional[Path]) -> Any:
    """A medium, or where it is, which is checked.

    Args:
        value: the path of a file, also as ``file://``; an address on the web, which is
            read now; ``data:...;base64,...``, or base64 alone; a dict of ``bytes``,
            ``data``, ``url`` or ``path``; or the medium itself. A video may be a list of
            images.
        kind: of it.
        where: file and line, for the messages.
        folder: that relative paths start from; None for the current one.

    Returns:
        a path, bytes, or the value that was given; of a video also a tuple of frames.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: an address does not answer.
        ValueError: it is none of these.
    """
    if isinstance(value, Mapping) and "array" not in value:
        value = _of_dict(value, kind, where)
    if kind == VIDEO and isinstance(value, (list, tuple)):
        return tuple(located(frame, IMAGE, where, folder) for frame in value)
    if isinstance(value, (int, float, list)):
        raise ValueError(
            f"{where}: {_a(kind)} is a path, an address, base64, bytes or a decoded "
            f"{kind}, got {short(value)}."
        )
    if isinstance(value, bytearray):
        return bytes(value)
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if text.startswith(_WEB):
        return _downloaded(text, kind, where)
    if text.startswith("data:"):
        return _of_data_address(text, kind, where)
    path = _path(text, folder)
    # Path.is_file raises where base64 is too long for a name.
    if not os.path.isfile(path):
        if _BASE64.fullmatch(text):
            return _decoded(text, kind, where)
        raise FileNotFoundError(
            f"{where}: there is no {kind} {str(path)[:500]!r}"
            f"{'' if Path(text).is_absolute() else ' (paths start from the data)'}."
        )
    return path


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "ai" else f"a {kind}"


def _of_dict(value: Mapping[str, Any], kind: str, where: str) -> Any:
    # A path beside the bytes is no more than their name.
    if value.get("bytes") is not None:
        return value["bytes"]
    for key in _ENCODED:
        if value.get(key) is not None:
            if not isinstance(value[key], str):
                raise ValueError(
                    f"{where}: the {key} of {_a(kind)} is base64, got "
                    f"{short(value[key])}."
                )
            if value[key].startswith("data:"):
                return value[key]
            return _decoded(value[key], kind, where)
    for key in (*_PLACES, kind):
        if value.get(key) is not None:
            return value[key]
    raise ValueError(
        f"{where}: {_a(kind)} in a dict has 'bytes', 'data', 'url' or 'path', got the "
        f"keys {', '.join(map(repr, value)) or 'none'}."
    )


def _path(text: str, folder: Optional[Path]) -> Path:
    if text.startswith("file://"):
        address = urlsplit(text)
        path = Path(unquote(address.netloc.removeprefix("localhost") + address.path))
    else:
        path = Path(text)
    return path if path.is_absolute() or folder is None else folder / path


def _of_data_address(text: str, kind: str, where: str) -> bytes:
    head, comma, data = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(
            f"{where}: {_a(kind)} in a data: address is written "
            f"'data:{kind}/...;base64,...', got {short(text)}."
        )
    return _decoded(unquote(data), kind, where)


def _decoded(text: str, kind: str, where: str) -> bytes:
    joined = "".join(text.split())
    try:
        # Some leave the padding away.
        return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"{where}: the base64 of {_a(kind)} is damaged ({error})."
        ) from error


def _downloaded(address: str, kind: str, where: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "masquant"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return answer.read()
    # A wrong address is a ValueError, a connection that breaks off an OSError or of
    # http.client's own kind.
    except Exception as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise OSError(
            f"{where}: cannot download the {kind} {address!r}: {reason}."
        ) from error
