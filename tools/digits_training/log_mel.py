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
FFT_LENGTH = 256
HOP_LENGTH = 128
CLIP_LENGTH = FRAMES * HOP_LENGTH
DYNAMIC_RANGE = 60.0  # dB below the loudest value of the clip


def mel_filters() -> Tensor:
    """Triangular filters, evenly spaced on the mel scale: float32 [bins, 129]."""

    def to_mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges = torch.linspace(to_mel(60.0), to_mel(SAMPLE_RATE / 2), MEL_BINS + 2)
    edges = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, SAMPLE_RATE / 2, FFT_LENGTH // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(waveform: Tensor) -> Tensor:
    """Log-mel spectrogram of one clip, as bytes.

    Args:
        waveform: float32 [samples] at 8 kHz, silence trimmed. Padded with silence, or
            cut, to 1.024 s.

    Returns:
        uint8 [40, 64]: 255 is the clip's loudest value, 0 is 60 dB or more below it.
    """
    waveform = F.pad(waveform, (0, max(0, CLIP_LENGTH - waveform.numel())))
    spectrum = torch.stft(
        waveform[:CLIP_LENGTH],
        FFT_LENGTH,
        HOP_LENGTH,
        window=torch.hann_window(FFT_LENGTH),
        return_complex=True,
    )
    power = mel_filters() @ spectrum[:, :FRAMES].abs().square()
    decibels = 10.0 * power.clamp(min=1e-10).log10()
    relative = (decibels - decibels.max()) / DYNAMIC_RANGE + 1.0
    return (relative.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
