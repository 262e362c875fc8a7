# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Reading images with Pillow, as transformers does: turned upright, and in RGB."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from torchao_masquant.data.media import located
from torchao_masquant.data.parts import IMAGE

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


def check_image(value: Any, where: str) -> None:
    """Look at the header of an image.

    Args:
        value: a path, the bytes of a file, or a decoded image.
        where: for the messages.

    Raises:
        ValueError: it is none that can be read.
        ImportError: there is no Pillow.
    """
    if isinstance(value, (bytes, Path)):
        _opened(value, where).close()
    else:
        _of_value(value, where)


def read_image(value: Any, where: str) -> Any:
    """A PIL image in RGB, turned as its EXIF orientation says.

    Args:
        value: a path; an address, on the web or ``data:``; the bytes of a file; a PIL
            image; or an array or a tensor of (height, width), (height, width, channels)
            or (channels, height, width), in 0..255, or of floating point in 0..1.
        where: for the messages.

    Raises:
        ValueError: it is none that can be read.
        OSError: there is no such file, or an address does not answer.
        ImportError: there is no Pillow.
    """
    from transformers.image_utils import load_image

    if isinstance(value, str):
        value = located(value, IMAGE, where, None)
    if not isinstance(value, (bytes, Path)):
        return load_image(_of_value(value, where))
    with _opened(value, where) as opened:
        try:
            return load_image(opened)
        # Decoding finds what the header did not tell.
        except _DAMAGE as error:
            raise _unreadable(value, where, error) from error


_CHANNELS = ((), (3,), (4,))

# Pillow has no class for them; what it says of a file that is too large is no OSError.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError)


def _opened(value: Any, where: str) -> Any:
    """An image whose pixels are not read yet."""
    pillow = _pillow()
    try:
        return pillow.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except (*_DAMAGE, pillow.DecompressionBombError) as error:
        raise _unreadable(value, where, error) from error


def _of_value(value: Any, where: str) -> Any:
    """A PIL image of what is an image already."""
    pillow = _pillow()
    if isinstance(value, pillow.Image):
        return value
    if not hasattr(value, "shape"):
        raise ValueError(
            f"{where}: an image is a path, an address, bytes, a PIL image or an array, "
            f"got a {type(value).__name__}."
        )
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] > 4:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    in_range = (
        pixels.size > 0
        and pixels.dtype.kind in "biuf"
        and pixels.min() >= 0
        and pixels.max() <= 255
    )
    if not in_range or pixels.ndim not in (2, 3) or pixels.shape[2:] not in _CHANNELS:
        raise ValueError(
            f"{where}: an image in an array is (height, width, 3) in 0..255, or of "
            f"floating point in 0..1, got {pixels.dtype} of shape {pixels.shape}."
        )
    if pixels.dtype.kind in "bf" and pixels.max() <= 1:
        pixels = pixels * 255.0
    return pillow.fromarray(np.round(pixels).astype(np.uint8))


def _unreadable(value: Any, where: str, error: Exception) -> ValueError:
    if isinstance(value, Path):
        said = f"{str(value)!r} is no image that can be read ({error})"
    else:
        said = f"what is given as an image, {len(value)} bytes, cannot be read as one"
    return ValueError(f"{where}: {said}.")
