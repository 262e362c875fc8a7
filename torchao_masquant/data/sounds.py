# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Reading sounds: with soundfile, or PCM in wav files by the standard library alone.

A sound comes out as one channel of float32, at the rate that the model's processor
asks for. Changing the rate is soxr's work; without it a sound must have it already.
"""

import importlib.util
import io
import math
import wave
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from torchao_masquant.data.media import located
from torchao_masquant.data.parts import AUDIO

__all__ = ["EXTENSIONS", "check_audio", "read_audio"]

#: of the files that a folder's sounds are looked for in
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")

_INSTALL = "pip install 'torchao_masquant[data]'"


def check_audio(value: Any, where: str) -> None:
    """Look at the header of a sound.

    Args:
        value: as :func:`read_audio` takes it.
        where: for the messages.

    Raises:
        ValueError: it is none that can be read here.
    """
    if not isinstance(value, (Path, bytes)):
        _decoded(value, where)
    elif _has("soundfile"):
        _with_soundfile(value, where, header_only=True)
    else:
        with _opened(value, where):
            pass


def read_audio(value: Any, sampling_rate: int, where: str) -> np.ndarray:
    """A sound as the model's processor takes it, and as transformers would load it.

    Args:
        value: a path; an address, on the web or ``data:``; the bytes of a file; a dict
            of ``array`` [time] or [channels, time] and ``sampling_rate``, or an object
            with these keys.
        sampling_rate: to come out, in Hz.
        where: for the messages.

    Returns:
        (time,) float32, in -1..1.

    Raises:
        ValueError: it cannot be read, is empty, or has another rate and there is no
            soxr to change that.
        OSError: there is no such file, or an address does not answer.
    """
    if isinstance(value, str):
        value = located(value, AUDIO, where, None)
    if not isinstance(value, (Path, bytes)):
        samples, rate = _decoded(value, where)
    elif _has("soundfile"):
        samples, rate = _with_soundfile(value, where)
    else:
        samples, rate = _with_wave(value, where)
    if samples.shape[0] == 0:
        raise ValueError(f"{where}: {_named(value)} is empty.")
    return _resampled(samples.mean(axis=1), rate, sampling_rate, where, value)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _named(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else "a sound"


def _unreadable(value: Any, where: str, reason: str) -> ValueError:
    return ValueError(
        f"{where}: {_named(value)} is no sound that can be read: {reason}"
    )


def _with_soundfile(
    value: Any, where: str, header_only: bool = False
) -> tuple[np.ndarray, int]:
    """Samples (time, channels), and their rate."""
    import soundfile

    file = io.BytesIO(value) if isinstance(value, bytes) else str(value)
    try:
        if header_only:
            with soundfile.SoundFile(file) as opened:
                return np.empty((0, 1), np.float32), opened.samplerate
        return soundfile.read(file, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise _unreadable(value, where, f"{str(error).rstrip('.')}.") from error


def _opened(value: Any, where: str) -> wave.Wave_read:
    file = io.BytesIO(value) if isinstance(value, bytes) else str(value)
    try:
        return wave.open(file, "rb")
    except (wave.Error, EOFError, OSError) as error:
        raise _unreadable(
            value,
            where,
            f"without soundfile it must be PCM in a wav file ({error}); convert it, or "
            f"{_INSTALL}.",
        ) from error


def _with_wave(value: Any, where: str) -> tuple[np.ndarray, int]:
    """Samples (time, channels), and their rate."""
    with _opened(value, where) as file:
        width, channels, rate = (
            file.getsampwidth(),
            file.getnchannels(),
            file.getframerate(),
        )
        data = file.readframes(file.getnframes())
    # A file that is cut off ends anywhere.
    data = data[: len(data) // (width * channels) * (width * channels)]
    if width == 1:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        # Three bytes, least first, into the upper three of four.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        integers = np.frombuffer(data, f"<i{width}")
        samples = integers.astype(np.float32) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels), rate


def _decoded(value: Any, where: str) -> tuple[np.ndarray, int]:
    """Samples (time, channels), and their rate, of what `datasets` decodes to."""
    try:
        samples = np.asarray(value["array"])
        rate = int(value["sampling_rate"])
        if samples.dtype in (np.int16, np.int32):
            samples = samples / -float(np.iinfo(samples.dtype).min)
        samples = samples.astype(np.float32)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        kind = "dict" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{where}: a sound is a path, bytes, or a dict of 'array' and "
            f"'sampling_rate', got a {kind}."
        ) from error
    return (samples[:, None] if samples.ndim == 1 else samples.T), rate


def _resampled(
    samples: np.ndarray, rate: int, wanted: int, where: str, value: Any
) -> np.ndarray:
    if rate == wanted:
        return samples.astype(np.float32)
    if not _has("soxr"):
        raise ValueError(
            f"{where}: {_named(value)} is sampled at {rate} Hz, the model hears "
            f"{wanted} Hz: convert it, or {_INSTALL}."
        )
    import soxr

    # The length is that of transformers' loader, which soxr may miss by one.
    length = math.ceil(len(samples) * wanted / rate)
    changed = soxr.resample(samples, rate, wanted)[:length]
    return np.pad(changed, (0, length - len(changed))).astype(np.float32)
