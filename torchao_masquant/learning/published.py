# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Smoothing factors learned as the authors of MASQuant learn them (arXiv 2603.04800)."""

import dataclasses
import math
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch

from torchao_masquant.learning.learn import BlockTask
from torchao_masquant.learning.learnable_weight import rounded_activations
from torchao_masquant.learning.token_variation import tokens_of
from torchao_masquant.options import Scheme
from torchao_masquant.recipe import LayerRecipe

__all__ = ["PublishedTask"]

# The authors keep the size of a factor from falling below.
_LEAST = 1e-2


class PublishedTask(BlockTask):
    """Smoothing factors of one block, learned while each modality has a weight of its own.

    Every linear has factors of its own, those that share an input too. The weight that
    tokens of a modality meet is ``Q(W s_m)``, their activations ``Q(x / s_m)``; both
    roundings pass gradients straight through, and scales follow what they are made of.
    The loss is the mean absolute error of the block's output, weighed by modality.
    AdamW at a constant rate takes a step for each sample, in their order, and the last
    iterate is kept: no sample is held back, and nothing is compared with the start.
    """

    def learn(
        self, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> dict[str, LayerRecipe]:
        """The linears' parts with learned factors.

        Raises:
            ValueError: the loss is not finite.
        """
        factors = {
            name: self.layers[name]
            .smoothing_factor.to(linear.weight.device)
            .clone()
            .requires_grad_(not self.options.spares(name))
            for name, linear in self.linears.items()
        }
        parameters = [factor for factor in factors.values() if factor.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.options.learning_rate, weight_decay=0.0
        )
        for _ in range(self.options.epochs):
            for call, x, target in zip(self.calls, inputs, targets):
                with torch.no_grad():
                    for factor in parameters:
                        factor.clamp_(min=_LEAST)
                with torch.enable_grad():
                    y = self._run(self._forward(factors), call, x)
                    loss = self._mean_absolute(y, target, call.ids)
                    if not math.isfinite(loss.item()):
                        raise ValueError(
                            f"learning of {self.name} diverged with a learning rate of "
                            f"{self.options.learning_rate:g}: give a smaller lr, or epochs=0."
                        )
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return {
            name: dataclasses.replace(
                self.layers[name],
                smoothing_factor=factor.detach().clamp(min=_LEAST).cpu()
                if factor.requires_grad
                else self.layers[name].smoothing_factor,
            )
            for name, factor in factors.items()
        }

    @torch.no_grad()
    def quantized_outputs(
        self, layers: Mapping[str, LayerRecipe], inputs: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Outputs of the block with a weight for each modality, which learning goes on from."""
        factors = {
            name: layers[name].smoothing_factor.to(linear.weight.device)
            for name, linear in self.linears.items()
        }
        forward = self._forward(factors)
        for call, x in zip(self.calls, inputs):
            yield self._run(forward, call, x)

    def _forward(self, factors: Mapping[str, torch.Tensor]) -> Any:
        rounded: dict[tuple[str, int], torch.Tensor] = {}

        def weight_of(name: str, row: int) -> torch.Tensor:
            if (name, row) not in rounded:
                weight = self.linears[name].weight.detach().float()
                rounded[name, row] = _rounded_weight(
                    weight * factors[name][row], self.options.number_format
                )
            return rounded[name, row]

        def forward(name: str, ids: Any, x: torch.Tensor) -> torch.Tensor:
            linear, bits = self.linears[name], self.options.number_format
            flat = x.reshape(-1, x.shape[-1]).float()
            met = torch.zeros_like(flat[:, 0], dtype=torch.int64)
            if ids is not None:
                met = ids.reshape(-1)
            y = flat.new_zeros(flat.shape[0], linear.out_features)
            for index in met.unique().tolist():
                if index < 0:
                    continue
                row = min(index, len(factors[name]) - 1)
                own = flat[met == index] / factors[name][row]
                if not bits.weight_only:
                    own = rounded_activations(own, bits.act_bits)
                y[met == index] = own @ weight_of(name, row).t()
            if linear.bias is not None:
                y = y + linear.bias.float()
            return y.reshape(*x.shape[:-1], -1).to(x.dtype)

        return forward

    def _mean_absolute(
        self, y: torch.Tensor, target: torch.Tensor, ids: Optional[torch.Tensor]
    ) -> torch.Tensor:
        error = (y.float() - target.float()).abs()
        total = error.new_zeros(())
        for index, importance in enumerate(self.importances):
            total = total + importance * tokens_of(error, ids, index).sum()
        return total / error.numel()


def _rounded_weight(weight: torch.Tensor, bits: Scheme) -> torch.Tensor:
    """(N, K), rounded to nearest in the scheme's format, straight through for gradients."""
    n, k = weight.shape
    width = bits.group_size or k
    blocks = weight.unflatten(1, (k // width, width))
    least, most = -(2 ** (bits.weight_bits - 1)), 2 ** (bits.weight_bits - 1) - 1
    tiny = torch.finfo(torch.float32).tiny
    if bits.symmetric:
        # The step is that of quantize_smoothed_weight: the largest weight is at a tie.
        step = blocks.abs().amax(-1, keepdim=True) / (most - least) * 2
        step = step.clamp_min(tiny)
        zero: Any = 0.0
    else:
        low = blocks.amin(-1, keepdim=True).clamp_max(0)
        high = blocks.amax(-1, keepdim=True).clamp_min(0)
        step = ((high - low) / (most - least)).clamp_min(tiny)
        zero = (least - low / step).round().detach()
    levels = blocks / step
    rounded = (levels + zero).round().clamp(least, most) - zero
    return ((levels + (rounded - levels).detach()) * step).reshape(n, k)
