# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operands of ``masquant::weight_only_linear``, and its result in float64."""

import math
from typing import Any, Optional

import numpy as np
import torch
from hadamard_oracle import hadamard_f64
from operator_oracle import f64, ids_for


def stored(weight: np.ndarray, weight_bits: int) -> torch.Tensor:
    """Below 8 bits two nibbles a byte, low one first, written without the package."""
    if weight_bits == 8:
        return torch.from_numpy(weight)
    if weight.shape[1] % 2:
        weight = np.pad(weight, ((0, 0), (0, 1)))
    nibbles = weight.astype(np.uint8) & 15
    return torch.from_numpy((nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).astype("uint8"))


class Problem:
    """Operands of one call, and its result in float64, token by token."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        weight_bits: int,
        *,
        groups: int = 1,
        asymmetric: bool = True,
        ranks: tuple[int, ...] = (2, 4),
        low_rank_bits: int = 16,
        dtype: torch.dtype = torch.float32,
        hadamard_size: int = 1,
    ):
        tokens, in_features, out_features = shape
        rng = np.random.default_rng(in_features)
        torch.manual_seed(in_features)
        least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1)
        size = (out_features, in_features)
        self.weight = rng.integers(least, most, size).astype(np.int8)
        zero_point = rng.integers(least, most, (out_features, groups)).astype(np.int8)
        self.weight_bits, self.ranks = weight_bits, ranks
        self.hadamard_size = hadamard_size
        self.x = torch.randn(tokens, in_features).to(dtype)
        self.pre_scale = torch.randn(len(ranks) + 1, in_features).exp()
        self.scale = torch.rand(out_features, groups) / 2**weight_bits + 1e-3
        self.zero_point = torch.from_numpy(zero_point) if asymmetric else None
        self.bias = torch.randn(out_features).to(dtype)
        self.modality_bias = torch.randn(len(ranks) + 1, out_features)
        self.ids = ids_for(tokens, len(ranks) + 1)
        rank = sum(ranks)
        self.low_rank_scale: Optional[torch.Tensor] = None
        if low_rank_bits == 8:
            self.l1 = torch.randint(-127, 128, (in_features, rank), dtype=torch.int8)
            self.l2 = torch.randint(-127, 128, (rank, out_features), dtype=torch.int8)
            self.low_rank_scale = torch.rand(rank) / 127**2 + 1e-6
        else:
            self.l1 = torch.randn(in_features, rank).bfloat16()
            self.l2 = torch.randn(rank, out_features).bfloat16()

    def args(self, **other: Any) -> list[Any]:
        whole: dict[str, Any] = dict(
            x=self.x,
            pre_scale=self.pre_scale,
            qdata=stored(self.weight, self.weight_bits),
            scale=self.scale,
            zero_point=self.zero_point,
            l1=self.l1,
            l2=self.l2,
            modality_bias=self.modality_bias,
            ids=self.ids,
            bias=self.bias,
            ranks=self.ranks,
            weight_bits=self.weight_bits,
            out_dtype=self.x.dtype,
            low_rank_scale=self.low_rank_scale,
            hadamard_size=self.hadamard_size,
        )
        return list({**whole, **other}.values())

    def expected(self, base_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Result and, of each element, the sum of the magnitudes of its terms."""
        width = self.weight.shape[1] // self.scale.shape[1]
        weight = self.weight.astype(np.float64)
        if self.zero_point is not None:
            weight -= np.repeat(self.zero_point.numpy(), width, 1)
        weight *= np.repeat(f64(self.scale), width, 1)
        down, up = f64(self.l1), f64(self.l2)
        if self.low_rank_scale is not None:
            down = down * f64(self.low_rank_scale)
        y = np.zeros((self.x.shape[0], weight.shape[0]))
        size = np.zeros_like(y)
        for t, m in enumerate([0] * len(y) if base_only else self.ids.tolist()):
            smoothed = f64(self.x[t]) * f64(self.pre_scale[m])
            rotation = hadamard_f64(len(smoothed), self.hadamard_size)
            widest = np.abs(smoothed) @ np.abs(rotation)
            smoothed = smoothed @ rotation
            terms = [(weight @ smoothed, np.abs(weight) @ widest)]
            if m:
                start = sum(self.ranks[: m - 1])
                own = slice(start, start + self.ranks[m - 1])
                a, b = down[:, own], up[own]
                low = (smoothed @ a) @ b
                terms.append((low, (widest @ np.abs(a)) @ np.abs(b)))
            extra = f64(self.modality_bias)[m]
            terms.append((extra, np.abs(extra)))
            terms.append((f64(self.bias), np.abs(f64(self.bias))))
            y[t] = sum(term for term, _ in terms)
            size[t] = sum(magnitude for _, magnitude in terms)
        return y, size

    @property
    def operations(self) -> int:
        """The smoothing, the weight's scale, K products and sums; the pair's scale, R
        products and sums; three sums of the terms; the rotation."""
        rotation = math.log2(self.hadamard_size) + 2 if self.hadamard_size > 1 else 0
        rest = 2 + self.weight.shape[1] + 1 + 1 + sum(self.ranks) + 1 + 3
        return rest + int(rotation)
