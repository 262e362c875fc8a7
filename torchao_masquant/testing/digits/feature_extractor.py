# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How a processor makes the digits model's features of sounds."""

from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from torchao_masquant.testing.digits.features import FRAMES, MEL_BINS, input_features
from torchao_masquant.testing.digits.log_mel import (
    CLIP_LENGTH,
    FFT_LENGTH,
    HOP_LENGTH,
    SAMPLE_RATE,
    log_mel,
)

__all__ = ["DigitsFeatureExtractor"]

#: Omni processors take sounds of 16 kHz.
_OVER = 2


class DigitsFeatureExtractor(WhisperFeatureExtractor):
    """Clips of 1.024 s; silence is added to shorter ones, and longer ones are cut.

    Processors ask for a Whisper's; of it, this has the calls and no values.
    """

    def __init__(self, **kwargs: Any):
        ours = {
            "feature_size": MEL_BINS,
            "sampling_rate": _OVER * SAMPLE_RATE,
            "hop_length": _OVER * HOP_LENGTH,
            "n_fft": _OVER * FFT_LENGTH,
            # In whole seconds, as callers reckon with.
            "chunk_length": 1,
        }
        super().__init__(**{**kwargs, **ours})
        self.n_samples = _OVER * CLIP_LENGTH
        self.nb_max_frames = FRAMES

    def __call__(self, raw_speech: Any, **kwargs: Any) -> Any:
        """As Whisper's, of sounds of 16 kHz."""
        one = isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 1
        sounds = [raw_speech] if one else raw_speech
        clips = [_clip(np.asarray(sound, np.float32)) for sound in sounds]
        return super().__call__(clips, **kwargs)

    def _torch_extract_fbank_features(
        self, waveform: np.ndarray, device: str = "cpu"
    ) -> np.ndarray:
        clips = torch.from_numpy(np.atleast_2d(waveform)).float()
        bytes_ = torch.stack([log_mel(clip, _OVER) for clip in clips])
        return input_features(bytes_).numpy()


def _clip(sound: np.ndarray) -> np.ndarray:
    length = _OVER * CLIP_LENGTH
    return np.pad(sound[:length], (0, max(0, length - len(sound))))
