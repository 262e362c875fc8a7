# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Reading videos with PyAV: a few of their frames, upright."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["EXTENSIONS", "check_video", "read_video"]

#: of the files that a folder's videos are looked for in
EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")

# As many as fit beside a question; by Qwen's example, two are seen in a second.
_MOST_FRAMES = 16
_RATE = 2.0


def check_video(value: Any, where: str) -> None:
    """Look at the header of a video.

    Args:
        value: a path, the bytes of a file, or (frames, height, width, 3).
        where: for the messages.

    Raises:
        ValueError: it is none that can be read.
        ImportError: there is no PyAV.
    """
    if isinstance(value, (bytes, Path)):
        _opened(value, where).close()
    elif getattr(value, "ndim", 0) != 4:
        raise ValueError(
            f"{where}: a video is a path, an address, bytes, a list of images, or an "
            f"array of (frames, height, width, 3), got a {type(value).__name__}."
        )


def read_video(value: Any, where: str) -> tuple[np.ndarray, Any]:
    """Frames at equal distances: two in a second, and 16 at most.

    Args:
        value: a path or the bytes of a file.
        where: for the messages.

    Returns:
        (frames, height, width, 3) uint8, and transformers' ``VideoMetadata`` that says
        when they were.

    Raises:
        ValueError: it cannot be read, or has no frames.
        ImportError: there is no PyAV.
    """
    import av
    from transformers.video_utils import VideoMetadata

    with _opened(value, where) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or _RATE)
        try:
            # Some files do not say how many frames they have.
            total = stream.frames or sum(1 for _ in container.decode(stream))
            count = min(total, _MOST_FRAMES, max(2, round(total / rate * _RATE)))
            wanted = np.linspace(0, total - 1, count).round().astype(int).tolist()
            container.seek(0)
            frames = [
                _upright(frame)
                for index, frame in enumerate(container.decode(video=0))
                if index in wanted
            ]
        except (av.FFmpegError, ValueError) as error:
            raise _unreadable(value, where, error) from error
    if not frames:
        raise ValueError(f"{where}: {_named(value)} has no frames.")
    metadata = VideoMetadata(
        total_num_frames=total,
        fps=rate,
        duration=total / rate,
        video_backend="pyav",
        frames_indices=wanted[: len(frames)],
    )
    return np.stack(frames), metadata


def _upright(frame: Any) -> np.ndarray:
    # A phone stores a video as its sensor lies, and how it was held beside it.
    turns = round((frame.rotation or 0) / 90) % 4
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _opened(value: Any, where: str) -> Any:
    if importlib.util.find_spec("av") is None:
        raise ImportError(
            "videos are read with PyAV, which is not installed: pip install "
            "'torchao_masquant[data]'."
        )
    import av

    try:
        opened = av.open(io.BytesIO(value) if isinstance(value, bytes) else str(value))
    except (av.FFmpegError, ValueError) as error:
        raise _unreadable(value, where, error) from error
    # PyAV opens a single image as well, as a pipe of them.
    if not opened.streams.video or opened.format.name.endswith(("_pipe", "image2")):
        opened.close()
        raise ValueError(f"{where}: {_named(value)} is no video.")
    return opened


def _named(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else "a video"


def _unreadable(value: Any, where: str, error: Exception) -> ValueError:
    return ValueError(
        f"{where}: {_named(value)} is no video that can be read ({error})."
    )
