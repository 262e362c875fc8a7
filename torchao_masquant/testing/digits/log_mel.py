# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From a clip's waveform to the bytes that are stored of it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_masquant.testing.digits.features import FRAMES, MEL_BINS

SAMPLE_RATE = 8000  # Hz
HIGHEST = 4000.0  # Hz
FFT_LENGTH = 256
HOP_LENGTH = 128
CLIP_LENGTH = FRAMES * HOP_LENGTH
DYNAMIC_RANGE = 60.0  # dB below the loudest value of the clip


def mel_filters(over: int = 1) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale: float32 [bins, 128 * over + 1].

    Args:
        over: how many times 8 kHz the sample rate is.
    """

    def to_mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges = torch.linspace(to_mel(60.0), to_mel(HIGHEST), MEL_BINS + 2)
    edges = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    bins = over * FFT_LENGTH // 2 + 1
    frequencies = torch.linspace(0.0, over * SAMPLE_RATE / 2, bins)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(waveform: Tensor, over: int = 1) -> Tensor:
    """Log-mel spectrogram of one clip, as bytes.

    Args:
        waveform: float32 [samples] at 8 kHz, silence trimmed. Padded with silence, or
            cut, to 1.024 s.
        over: how many times 8 kHz its sample rate is.

    Returns:
        uint8 [40, 64]: 255 is the clip's loudest value, 0 is 60 dB or more below it.
    """
    length, window = over * CLIP_LENGTH, over * FFT_LENGTH
    waveform = F.pad(waveform, (0, max(0, length - waveform.numel())))
    spectrum = torch.stft(
        waveform[:length],
        window,
        over * HOP_LENGTH,
        window=torch.hann_window(window),
        return_complex=True,
    )
    power = mel_filters(over) @ spectrum[:, :FRAMES].abs().square()
    decibels = 10.0 * power.clamp(min=1e-10).log10()
    relative = (decibels - decibels.max()) / DYNAMIC_RANGE + 1.0
    return (relative.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def waveform_of(log_mel: Tensor, steps: int = 64) -> Tensor:
    """A sound with such a spectrogram, its phases found by Griffin and Lim's method.

    Args:
        log_mel: uint8 [40, 64].
        steps: of each of the two searches.

    Returns:
        float32 [8192] at 8 kHz, its loudest sample 0.5.
    """
    filters = mel_filters()
    wanted = 10.0 ** ((log_mel.float() / 255.0 - 1.0) * DYNAMIC_RANGE / 10.0)
    # Powers are positive, and so are all factors of these steps towards them.
    power = torch.ones(filters.shape[1], FRAMES)
    for _ in range(steps):
        power = (
            power
            * (filters.T @ wanted)
            / (filters.T @ (filters @ power)).clamp(min=1e-12)
        )
    magnitude = F.pad(power.sqrt(), (0, 1))
    window = torch.hann_window(FFT_LENGTH)
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(magnitude.shape, generator=generator) * 2 * math.pi
    for _ in range(steps):
        waveform = torch.istft(
            torch.polar(magnitude, phase),
            FFT_LENGTH,
            HOP_LENGTH,
            window=window,
            length=CLIP_LENGTH,
        )
        phase = torch.stft(
            waveform, FFT_LENGTH, HOP_LENGTH, window=window, return_complex=True
        ).angle()
    return waveform * (0.5 / waveform.abs().max())
