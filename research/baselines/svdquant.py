# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""SVDQuant's form: what is large in a smoothed weight goes through a pair of 16 bits."""

from typing import Optional, Sequence

import torch
from torch import nn

from torchao_masquant.options import Scheme
from torchao_masquant.solver.smoothing import WeightSizes, smoothing_factor
from torchao_masquant.statistics.input_statistics import InputStatistics
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["SvdQuantLinear", "svdquant"]

# Its authors' choice.
_RANK = 32

_EXPONENTS = (0.1, 0.3, 0.5, 0.7, 0.9)


class SvdQuantLinear(nn.Module):
    """``Q(x / s) Q(W s - (L1 L2)^T)^T + (x / s) L1 L2``: the pair reads what is not rounded.

    Args:
        linear: (N, K) in high precision.
        factor: (K,) float64, s.
        bits: number formats.
        rank: of the pair, the leading singular vectors of ``W s``.
    """

    def __init__(
        self, linear: nn.Linear, factor: torch.Tensor, bits: Scheme, rank: int
    ):
        super().__init__()
        self.bias = linear.bias
        smoothed = linear.weight.data.double() * factor
        u, singular, v = torch.linalg.svd(smoothed.float(), full_matrices=False)
        root = singular[:rank].sqrt()
        self.l1 = (v[:rank].t() * root).bfloat16()
        self.l2 = (u[:, :rank] * root).t().bfloat16()
        left = smoothed - (self.l1.double() @ self.l2.double()).t()
        self.factor = factor.float()
        self.weight = MASQuantTensor.from_hp(
            (left / factor).to(linear.weight.dtype),
            weight_bits=bits.weight_bits,
            act_bits=bits.act_bits,
            group_size=bits.group_size,
            symmetric=bits.symmetric,
            smoothing_factor=self.factor[None],
            weight_format=bits.weight_format,
            act_format=bits.act_format,
        )

    @property
    def nbytes_stored(self) -> int:
        """Bytes of weight, factor and pair."""
        return self.weight.nbytes_stored + self.l1.nbytes + self.l2.nbytes

    def routed(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        """(..., K) to (..., N), whatever the ids."""
        y = torch.ops.masquant.linear(x, self.weight, None, self.bias)
        return y + (x / self.factor.to(x)) @ self.l1.to(x) @ self.l2.to(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.routed(x, None)


def svdquant(
    linears: Sequence[nn.Linear],
    statistics: InputStatistics,
    bits: Scheme,
    rank: int = _RANK,
) -> list[SvdQuantLinear]:
    """As in arXiv 2411.05007, for linears that share their input.

    Its form, our code: SmoothQuant's factor with the exponent that leaves the least error
    of the outputs, all tokens counting alike; one pair of all tokens; the rest of the weight
    rounded to nearest.

    Args:
        linears: in high precision.
        statistics: of their input, with samples of tokens.
        bits: number formats.
        rank: of the pairs.
    """
    sizes = WeightSizes.of({str(i): m.weight.data for i, m in enumerate(linears)})
    ranges = [torch.maximum(m.amax, -m.amin) for m in statistics.moments if m.count]
    samples = [(m.sample, m.count) for m in statistics.moments if m.count]
    best: list[SvdQuantLinear] = []
    least = float("inf")
    for exponent in _EXPONENTS:
        factor = smoothing_factor(torch.stack(ranges).amax(0), sizes.absmax, exponent)
        found = [SvdQuantLinear(linear, factor, bits, rank) for linear in linears]
        error = 0.0
        for quantized, linear in zip(found, linears):
            for x, count in samples:
                wrong = quantized(x) - nn.functional.linear(
                    x, linear.weight.data, linear.bias
                )
                error += wrong.square().mean().item() * count
        if error < least:
            best, least = found, error
    return best
