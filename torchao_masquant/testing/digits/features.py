# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From stored bytes to the model's inputs, for images and for sound.

Images and log-mel spectrograms are stored, trained on and evaluated as bytes, so that
nothing changes when a packaged example is read back.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Images: [8, 8] with values 0..16, enlarged to 16 x 16, cut into patches of 2 x 2,
# which the vision tower merges two by two: 16 tokens.
IMAGE_MAX = 16
IMAGE_SIZE = 16
PATCH_SIZE = 2
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
CHANNELS = 3
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE

# Sound: 64 frames of 16 ms (1.024 s), of which the audio tower merges four: 16 tokens.
SAMPLE_RATE = 8000  # Hz
FFT_LENGTH = 256
HOP_LENGTH = 128
MEL_BINS = 40
FRAMES = 64
CLIP_LENGTH = FRAMES * HOP_LENGTH
DYNAMIC_RANGE = 60.0  # dB below the loudest value of the clip


def pixel_values(images: Tensor) -> Tensor:
    """Images as the flattened patches the vision tower expects.

    Args:
        images: uint8 [n, 8, 8], 0 (paper) to 16 (ink).

    Returns:
        float32 [n * 64, 24]. The rows of one image are ordered (t, gh, gw, mh, mw),
        patches that are merged being neighbours, and the columns (c, tp, ph, pw).
    """
    scaled = images.float() / IMAGE_MAX * 2 - 1
    enlarged = F.interpolate(
        scaled[:, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear"
    )
    blocks = GRID_SIZE // MERGE_SIZE
    patches = enlarged.reshape(
        -1, 1, blocks, MERGE_SIZE, PATCH_SIZE, blocks, MERGE_SIZE, PATCH_SIZE
    )
    # (n, c, gh, mh, ph, gw, mw, pw) -> (n, gh, gw, mh, mw, c, ph, pw)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)
    # A still image is one temporal patch of identical frames, grey three equal colors.
    patches = patches[:, :, :, :, :, :, None].expand(
        -1, -1, -1, -1, -1, CHANNELS, TEMPORAL_PATCH_SIZE, -1, -1
    )
    columns = CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
    return patches.reshape(-1, columns)


def image_grid_thw(count: int) -> Tensor:
    """int64 [count, 3]: every image is one frame of 8 x 8 patches."""
    return torch.tensor([[1, GRID_SIZE, GRID_SIZE]]).repeat(count, 1)


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


def input_features(log_mels: Tensor) -> Tensor:
    """uint8 [n, 40, 64] to the audio tower's float32 [n, 40, 64] in -1..1."""
    return log_mels.float() / 255.0 * 2 - 1
