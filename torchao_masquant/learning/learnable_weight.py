# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized weight whose floats have gradients."""

import dataclasses
from typing import Any, Optional

import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["LearnableWeight", "rounded_activations"]


class LearnableWeight:
    """``masquant::linear`` in float32, differentiable in all but the integers.

    What is learned, all relative to where it starts, so that one learning rate fits
    all: logarithms of the smoothing factors (as in MAS) and of the weight's scales,
    shifts, low-rank pairs, modality biases. Rounding of the activations passes
    gradients straight through.

    Args:
        layer: the solution to start from.
        quantized: made from it.
    """

    def __init__(self, layer: LayerRecipe, quantized: MASQuantTensor):
        self.layer, self.quantized = layer, quantized
        levels = quantized.int_data().float()
        width = quantized.group_size
        if quantized.zero_point is not None:
            levels -= quantized.zero_point.float().repeat_interleave(width, 1)
        self.levels, self.width = levels, width
        l1, l2 = quantized.l1, quantized.l2
        if l1 is not None and quantized.low_rank_scale is not None:
            l1 = l1.float() * quantized.low_rank_scale
        shift = quantized.act_shift
        self.start: dict[str, torch.Tensor] = {
            "scale": quantized.scale,
            "pre_scale": quantized.act_pre_scale,
        }
        if shift is not None:
            # The shift is learned for activations as they come, so that it follows the
            # factor.
            self.start["shift"] = shift / quantized.act_pre_scale
        if l1 is not None and l2 is not None:
            self.start |= {"l1": l1.float(), "l2": l2.float()}
        if quantized.modality_bias is not None:
            self.start["bias"] = quantized.modality_bias
        self.deltas = {
            name: torch.zeros_like(value).requires_grad_()
            for name, value in self.start.items()
        }
        self.units = {
            name: value.square().mean().sqrt().clamp_min(1e-12)
            for name, value in self.start.items()
        }
        if shift is not None:
            # A shift moves in steps of what a channel's smoothing makes of one.
            self.units["shift"] = self.start["pre_scale"].reciprocal()
        self.owner = torch.repeat_interleave(
            torch.arange(1, len(quantized.ranks) + 1),
            torch.tensor(quantized.ranks, dtype=torch.int64),
        ).to(levels.device)

    def parameters(self) -> list[torch.Tensor]:
        """What to learn."""
        return list(self.deltas.values())

    def _value(self, name: str) -> torch.Tensor:
        delta = self.deltas[name]
        if name in ("scale", "pre_scale"):
            return self.start[name] * delta.exp()
        return self.start[name] + self.units[name] * delta

    def linear(
        self,
        x: torch.Tensor,
        ids: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """(..., K) to (..., N), as ``masquant::linear``."""
        rows = x.new_zeros(x.shape[:-1], dtype=torch.int64) if ids is None else ids
        if self.quantized.act_pre_scale.shape[0] == 1:
            rows = torch.zeros_like(rows)
        rows = rows.reshape(x.shape[:-1]).clamp_min(0)
        pre_scale = self._value("pre_scale")
        smoothed = x.float()
        if "shift" in self.start:
            smoothed = smoothed - self._value("shift")[rows]
        smoothed = smoothed * pre_scale[rows]
        smoothed = hadamard_rotate(smoothed, self.quantized.hadamard_size or 1)
        if not self.quantized.weight_only:
            smoothed = rounded_activations(smoothed, self.quantized.act_bits)
        scale = self._value("scale").repeat_interleave(self.width, 1)
        y = smoothed @ (self.levels * scale).t()
        if "l1" in self.start:
            hidden = (smoothed @ self._value("l1")) * (rows[..., None] == self.owner)
            y = y + hidden @ self._value("l2")
        if "bias" in self.start:
            y = y + self._value("bias")[rows]
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype)

    @torch.no_grad()
    def result(self) -> LayerRecipe:
        """What was learned, as a part of a recipe."""
        pre_scale = self._value("pre_scale")
        held = self.layer.l1.dtype if self.layer.l1 is not None else torch.bfloat16
        found: dict[str, Any] = {
            "smoothing_factor": pre_scale.reciprocal(),
            "qdata": self.quantized.int_data(),
            "scale": self._value("scale"),
        }
        if self.quantized.zero_point is not None:
            found["zero_point"] = self.quantized.zero_point
        if "shift" in self.start:
            found["act_shift"] = self._value("shift") * pre_scale
        if "l1" in self.start:
            found |= {
                "l1": self._value("l1").to(held),
                "l2": self._value("l2").to(held),
            }
        if "bias" in self.start:
            found["modality_bias"] = self._value("bias")
        return dataclasses.replace(
            self.layer, **{name: t.detach().cpu() for name, t in found.items()}
        )


def rounded_activations(smoothed: torch.Tensor, act_bits: int) -> torch.Tensor:
    """Symmetric per-token rounding that gradients pass straight through."""
    quant_max = 2 ** (act_bits - 1) - 1
    step = smoothed.abs().amax(-1, keepdim=True) / quant_max
    step = step.clamp_min(torch.finfo(torch.float32).tiny)
    levels = smoothed / step
    rounded = levels.round().clamp(-quant_max, quant_max)
    return (levels + (rounded - levels).detach()) * step
