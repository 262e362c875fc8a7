# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a quantized layer prints: scheme, modalities, ranks and bytes."""

import tiny_models
import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantLinear


def test_a_layer_tells_scheme_modalities_ranks_and_bytes():
    model = tiny_models.quantized(
        tiny_models.PlainModel(), scheme="w4a8", method="masquant-paper", rank=2
    )
    first = model.first
    assert isinstance(first, MASQuantLinear)
    # 24 x 8 packed integers, 24 scales, 3 x 16 factors, and pairs of 4 x (16 + 24).
    size = 24 * 8 + 24 * 4 + 3 * 16 * 4 + 2 * 4 * (16 + 24)
    assert repr(first) == (
        "MASQuantLinear(in_features=16, out_features=24, bias=True, w4a8, "
        "modalities=('text', 'vision', 'audio'), ranks={'vision': 2, 'audio': 2}, "
        f"{size} bytes)"
    )


def test_a_layer_without_modalities_says_so():
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    quantize_(model, MASQuantConfig(step="prepare", scheme="w8a8", method="rtn"))
    model(torch.randn(4, 16))
    quantize_(model, MASQuantConfig(step="convert", scheme="w8a8", method="rtn"))
    assert repr(model[0]) == (
        "MASQuantLinear(in_features=16, out_features=8, bias=False, w8a8, one smoothing "
        f"factor for all modalities, {8 * 16 + 8 * 4 + 16 * 4} bytes)"
    )
