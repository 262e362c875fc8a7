# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Reading images, with Pillow."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["EXTENSIONS", "check_image", "read_image"]

#: of the files that a folder's images are looked for in
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def _pillow() -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise ImportError(
            "images are read with Pillow, which is not installed: pip install "
            "'torchao_masquant[data]'."
        )
    import PIL.Image

    return PIL.Image


def check_image(path: Path, where: str) -> None:
    """Look at the header of an image.

    Raises:
        ValueError: it is none that Pillow can read.
        ImportError: there is no Pillow.
    """
    try:
        with _pillow().open(path):
            pass
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, where, error) from error


def read_image(value: Any, where: str) -> Any:
    """A PIL image in RGB.

    Args:
        value: a path, an address on the web, the bytes of a file, an image, or
            (height, width, 3) uint8.
        where: for the messages.

    Raises:
        ValueError: it is none that Pillow can read.
        OSError: an address does not answer.
        ImportError: there is no Pillow.
    """
    image = _pillow()
    if isinstance(value, np.ndarray):
        return image.fromarray(value)
    if isinstance(value, image.Image):
        return value.convert("RGB")
    if isinstance(value, str):
        return _download(value, where).convert("RGB")
    if not isinstance(value, (bytes, Path)):
        raise ValueError(
            f"{where}: an image is a path, an address, bytes or a PIL image, got a "
            f"{type(value).__name__}."
        )
    try:
        with image.open(
            io.BytesIO(value) if isinstance(value, bytes) else value
        ) as read:
            return read.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(value, where, error) from error


def _download(address: str, where: str) -> Any:
    from transformers.image_utils import load_image

    try:
        return load_image(address)
    # Whatever the transport raises; its classes differ between releases.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{where}: cannot download {address!r}: {reason}") from error


def _unreadable(value: Any, where: str, error: Exception) -> ValueError:
    name = repr(str(value)) if isinstance(value, Path) else "an image"
    return ValueError(f"{where}: {name} is no image that can be read ({error}).")
