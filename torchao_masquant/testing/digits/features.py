# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From stored bytes to the model's inputs, for images and for sound.

Images and log-mel spectrograms are stored, trained on and evaluated as bytes, so that
nothing changes when a packaged example is read back.
"""

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
MEL_BINS = 40
FRAMES = 64


def enlarged(images: Tensor) -> Tensor:
    """uint8 [n, 8, 8] to float32 [n, 16, 16] in -1 (paper) to 1."""
    scaled = images.float() / IMAGE_MAX * 2 - 1
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(scaled[:, None], size=size, mode="bilinear")[:, 0]


def pixel_values(images: Tensor) -> Tensor:
    """Images as the flattened patches the vision tower expects.

    Args:
        images: uint8 [n, 8, 8], 0 (paper) to 16 (ink).

    Returns:
        float32 [n * 64, 24]. The rows of one image are ordered (t, gh, gw, mh, mw),
        patches that are merged being neighbours, and the columns (c, tp, ph, pw).
    """
    blocks = GRID_SIZE // MERGE_SIZE
    patches = enlarged(images).reshape(
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


def input_features(log_mels: Tensor) -> Tensor:
    """uint8 [n, 40, 64] to the audio tower's float32 [n, 40, 64] in -1..1."""
    return log_mels.float() / 255.0 * 2 - 1
