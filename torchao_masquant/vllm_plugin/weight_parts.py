# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized weight as a layer of vLLM holds it."""

from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

__all__ = ["WeightParts"]


class WeightParts(nn.Module):
    """The parts of one weight as buffers, which graphs take as they take any tensor.

    Args:
        weight: (N, K), or (E, N, K) of experts.
    """

    def __init__(self, weight: MASQuantTensor):
        super().__init__()
        for name in PARTS:
            part = getattr(weight, name)
            part = None if part is None else part.contiguous()
            self.register_buffer(name, part, persistent=False)
        self.ranks = list(weight.ranks)
        self.weight_bits = weight.weight_bits
        self.weight_format = weight.weight_format
        self.act_bits = weight.act_bits
        self.act_format = weight.act_format
        self.hadamard_size = weight.hadamard_size
        self.is_routed = weight.is_routed
