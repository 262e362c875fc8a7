# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a layer of vLLM holds of quantized weights, and how it is called.

A layer that vLLM has merged (q, k and v; gate and up) has one weight for each of its shards.
They read one input and nearly always smooth it alike, so that it is smoothed and quantized
once. Shards without low-rank pairs are one weight; ranks of pairs differ.
"""

from typing import Optional, Sequence

import torch
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS

__all__ = ["QuantizedShards"]


class _Shard(nn.Module):
    """The parts of one weight as buffers, which graphs take as they take any tensor."""

    qdata: torch.Tensor
    scale: torch.Tensor
    act_pre_scale: torch.Tensor
    l1: Optional[torch.Tensor]
    l2: Optional[torch.Tensor]
    modality_bias: Optional[torch.Tensor]
    zero_point: Optional[torch.Tensor]
    low_rank_scale: Optional[torch.Tensor]
    act_shift: Optional[torch.Tensor]

    def __init__(self, weight: MASQuantTensor):
        super().__init__()
        for name in PARTS:
            part = getattr(weight, name)
            part = None if part is None else part.contiguous()
            self.register_buffer(name, part, persistent=False)
        self.ranks = list(weight.ranks)
        self.weight_bits = weight.weight_bits
        self.act_bits = weight.act_bits
        self.hadamard_size = weight.hadamard_size or 1
        self.is_routed = weight.is_routed

    def smooths_like(self, other: "_Shard") -> bool:
        """Whether both make the same integers of an input."""
        ours, theirs = self.act_shift, other.act_shift
        if ours is None or theirs is None:
            same_shift = ours is theirs
        else:
            same_shift = torch.equal(ours, theirs)
        return (
            same_shift
            and self.act_bits == other.act_bits
            and self.hadamard_size == other.hadamard_size
            and torch.equal(self.act_pre_scale, other.act_pre_scale)
        )

    def smooth(
        self, tokens: torch.Tensor, ids: Optional[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, K) int8 and (T, 1) float32 of tokens (T, K)."""
        return torch.ops.masquant.smooth_quantize(
            tokens,
            self.act_pre_scale,
            ids,
            self.act_bits,
            self.act_shift,
            self.hadamard_size,
        )

    def integer_product(
        self,
        smoothed: tuple[torch.Tensor, torch.Tensor],
        ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """(T, N) of what :meth:`smooth` gives."""
        qx, x_scale = smoothed
        hidden = None
        if ids is not None and self.l1 is not None:
            hidden = torch.ops.masquant.low_rank_down(
                qx, x_scale, self.l1, ids, self.ranks, self.low_rank_scale
            )
        return torch.ops.masquant.int_linear(
            qx,
            x_scale,
            self.qdata,
            self.scale,
            hidden,
            None if hidden is None else self.l2,
            self.modality_bias,
            ids,
            bias,
            self.weight_bits,
            dtype,
        )

    def product(
        self,
        tokens: torch.Tensor,
        ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """(T, N) where activations are not quantized."""
        return torch.ops.masquant.weight_only_linear(
            tokens,
            self.act_pre_scale,
            self.qdata,
            self.scale,
            self.zero_point,
            None if ids is None else self.l1,
            None if ids is None else self.l2,
            self.modality_bias,
            ids,
            bias,
            self.ranks,
            self.weight_bits,
            tokens.dtype,
            None if ids is None else self.low_rank_scale,
            self.hadamard_size,
        )


class QuantizedShards(nn.Module):
    """One layer's quantized weights, in the order of its outputs.

    Args:
        weights: one of each shard, (N_i, K), of one type.
    """

    def __init__(self, weights: Sequence[MASQuantTensor]):
        super().__init__()
        if len(weights) > 1 and not any(sum(w.ranks) for w in weights):
            weights = _joined(weights)
        shards = [_Shard(weight) for weight in weights]
        self.shards = nn.ModuleList(shards)
        self.sizes = [weight.shape[0] for weight in weights]
        self.is_routed = any(weight.is_routed for weight in weights)
        self.smooth_alike = all(shards[0].smooths_like(other) for other in shards)

    def forward(
        self,
        x: torch.Tensor,
        ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """The outputs of all shards, side by side.

        Args:
            x: (..., K) floating point.
            ids: (T,) int32 modality ids of its tokens, or None: all are base.
            bias: (N,), of all shards, or None.

        Returns:
            (..., N) of x's type.
        """
        tokens = x.reshape(-1, x.shape[-1])
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        outputs, smoothed = [], None
        for shard, own in zip(self.shards, biases):
            assert isinstance(shard, _Shard)
            known = ids if shard.is_routed else None
            if shard.act_bits == 16:
                outputs.append(shard.product(tokens, known, own))
                continue
            if smoothed is None or not self.smooth_alike:
                smoothed = shard.smooth(tokens, known)
            outputs.append(shard.integer_product(smoothed, known, own, x.dtype))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _joined(weights: Sequence[MASQuantTensor]) -> Sequence[MASQuantTensor]:
    """One weight of several whose rows may stand below each other; else they stay."""
    try:
        joined = torch.cat(list(weights), 0)
    except ValueError:
        return weights
    assert isinstance(joined, MASQuantTensor)
    return [joined]
