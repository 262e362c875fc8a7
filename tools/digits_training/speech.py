# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Spoken digits: recordings of people, and many synthetic voices.

The recordings are those of the Asterisk telephone exchange
(five speakers, five languages; see the NOTICE file for their licenses), the synthetic
voices are espeak-ng's, in the same languages.
"""

import io
import random
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_masquant.testing.digits.log_mel import SAMPLE_RATE, log_mel

RECORDINGS = Path("/usr/share/asterisk/sounds")
SPEAKERS = (
    "en_US_f_Allison",
    "es_MX_f_Allison",
    "fr_CA_f_June",
    "it_IT_m_Carlo",
    "ru_RU_f_IvrvoiceRU",
)
# Recordings are few: each is also heard at other speeds, always in the same split.
RECORDING_SPEEDS = (1.0, 0.86, 0.93, 1.07, 1.15)

# Not "en-gb", for which espeak-ng 1.51 ignores the voice.
LANGUAGES = ("en-us", "en", "en-029", "en-gb-scotland", "es", "fr", "it", "ru")
LANGUAGE_WEIGHTS = (5, 4, 2, 2, 1, 1, 1, 1)
TRAINING_VOICES = (
    *("adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "antonio", "aunty"),
    *("belinda", "benjamin", "boris", "caleb", "david", "Denis", "Diogo", "ed"),
    *("edward", "f1", "f2", "f3", "f4", "gene", "gustave", "Henrique", "Hugo"),
    *("iven", "iven3", "Jacky", "john", "kaukovalta", "klatt2", "linda", "m1"),
    *("m2", "m3", "m4", "m5", "m8", "Marco", "max", "Michael", "miguel", "Nguyen"),
    *("pablo", "paul", "pedro", "quincy", "rob", "robert", "steph", "steph3"),
    *("victor", "zac"),
)
HELDOUT_VOICES = (
    *("anika", "croak", "f5", "grandpa", "klatt3", "Lee", "m6", "m7", "norbert"),
    *("sandro", "shelby", "Storm", "travis"),
)


@dataclass(frozen=True)
class Clips:
    """Spoken digits.

    Attributes:
        log_mels: uint8 [n, 40, 64].
        digits: int64 [n].
    """

    log_mels: Tensor
    digits: Tensor


def check_installed() -> None:
    """Raise one sentence that says what to install, where something is missing."""
    if not shutil.which("espeak-ng"):
        raise RuntimeError(
            "espeak-ng is missing: install it with `apt-get install espeak-ng`"
        )
    missing = [name for name in SPEAKERS if not (RECORDINGS / name).is_dir()]
    if missing:
        packages = " ".join(
            f"asterisk-core-sounds-{name[:2]}-wav" for name in sorted(missing)
        )
        raise RuntimeError(
            f"recordings of spoken digits are missing under {RECORDINGS}: install them "
            f"with `apt-get install {packages}`"
        )


def read_wav(stream: io.BytesIO | str) -> tuple[Tensor, int]:
    """Mono 16-bit WAV to float32 [samples] in -1..1, and its sample rate in Hz."""
    with wave.open(stream, "rb") as reader:
        # espeak-ng writes a stream whose header claims more frames than there are;
        # reading ends with the data.
        data = bytearray(reader.readframes(reader.getnframes()))
        samples = torch.frombuffer(data, dtype=torch.int16).float() / 32768.0
        return samples, reader.getframerate()


def _resample(waveform: Tensor, ratio: float) -> Tensor:
    """Change the number of samples by ``ratio`` with a band-limited interpolation."""
    length = round(waveform.numel() * ratio)
    spectrum = torch.fft.rfft(waveform)
    bins = length // 2 + 1
    spectrum = F.pad(spectrum, (0, max(0, bins - spectrum.numel())))[:bins]
    return torch.fft.irfft(spectrum, n=length) * ratio


def _trim(waveform: Tensor) -> Tensor:
    """Cut leading and trailing silence, leaving 20 ms before the first sound."""
    frame = SAMPLE_RATE // 100
    energy = waveform[: waveform.numel() // frame * frame].view(-1, frame).square()
    level = energy.mean(dim=1)
    loud = (level > 1e-3 * level.max()).nonzero()
    first, last = int(loud[0]), int(loud[-1])
    return waveform[max(0, first - 2) * frame : (last + 1) * frame]


def clip(waveform: Tensor, sample_rate: int, speed: float = 1.0) -> Tensor:
    """uint8 [40, 64] log-mel of a waveform played at ``speed``."""
    return log_mel(_trim(_resample(waveform, SAMPLE_RATE / sample_rate / speed)))


def recordings(heldout: bool) -> Clips:
    """The recordings of one split.

    Of each digit, one speaker's recording is held out: ten of fifty.
    """
    log_mels, digits = [], []
    for digit in range(10):
        for index, speaker in enumerate(SPEAKERS):
            if (digit % len(SPEAKERS) == index) != heldout:
                continue
            path = RECORDINGS / speaker / "digits" / f"{digit}.wav"
            waveform, sample_rate = read_wav(str(path))
            for speed in RECORDING_SPEEDS[:1] if heldout else RECORDING_SPEEDS:
                log_mels.append(clip(waveform, sample_rate, speed))
                digits.append(digit)
    return Clips(torch.stack(log_mels), torch.tensor(digits))


def speak(language: str, voice: str, pitch: int, speed: int, digit: int) -> Tensor:
    """One digit said by espeak-ng: uint8 [40, 64].

    Args:
        language: Language whose word for the digit is said.
        voice: espeak-ng's name of the speaker (a "variant").
        pitch: 0 to 99.
        speed: Words per minute.
        digit: 0 to 9.
    """
    command = ["espeak-ng", "-v", f"{language}+{voice}", "-p", str(pitch)]
    command += ["-s", str(speed), "--stdout", str(digit)]
    result = subprocess.run(command, check=True, capture_output=True)
    return clip(*read_wav(io.BytesIO(result.stdout)))


def synthetic(count: int, heldout: bool, seed: int) -> Clips:
    """``count`` clips, all in different settings, by the voices of one split."""
    generator = random.Random(seed)
    voices = HELDOUT_VOICES if heldout else TRAINING_VOICES
    settings: dict[tuple[str, str, int, int, int], None] = {}
    while len(settings) < count:
        language = generator.choices(LANGUAGES, LANGUAGE_WEIGHTS)[0]
        pitch, speed = generator.randrange(20, 80, 2), generator.randrange(140, 220, 4)
        digit = len(settings) % 10
        settings[language, generator.choice(voices), pitch, speed, digit] = None
    with ThreadPoolExecutor(max_workers=2) as pool:
        log_mels = list(pool.map(lambda setting: speak(*setting), settings))
    digits = [setting[-1] for setting in settings]
    return Clips(torch.stack(log_mels), torch.tensor(digits))


def spoken_digits(count: int, heldout: bool, seed: int) -> Clips:
    """``count`` synthetic clips and the recordings of one split."""
    people, voices = recordings(heldout), synthetic(count, heldout, seed)
    return Clips(
        torch.cat([people.log_mels, voices.log_mels]),
        torch.cat([people.digits, voices.digits]),
    )
