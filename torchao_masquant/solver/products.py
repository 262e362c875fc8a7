# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What weights give of covariances, which all that is solved for is made of."""

from typing import Mapping, Sequence

import torch

__all__ = ["HELD_BYTES", "Products"]

#: Of products that are held, at most; what would take more is made again where needed.
HELD_BYTES = 4 << 30


class Products:
    """``W C_m`` of each linear and modality, and the energies ``tr(W C_m W^T)``.

    A product takes 2 N K^2 operations, most of what a wide linear takes in all, and serves
    every exponent, gauge and rounding.

    Args:
        weights: name to (N_i, K).
        covariances: (K, K) float64 of each modality.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], covariances: Sequence[torch.Tensor]
    ):
        self._weights, self._covariances = weights, covariances
        size = sum(weight.numel() for weight in weights.values())
        self._holds = 8 * size * len(covariances) <= HELD_BYTES
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._energies: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, name: str, modality: int) -> torch.Tensor:
        """(N, K) float64, ``W C_m``; not to be written to."""
        key = name, modality
        product = self._held.get(key)
        if product is None:
            weight = self._weights[name].double()
            product = weight @ self._covariances[modality]
            self._energies[key] = (product * weight).sum()
            if self._holds:
                self._held[key] = product
        return product

    def energy(self, name: str, modality: int) -> torch.Tensor:
        """``tr(W C_m W^T)``, of what varies in the output; a float64 scalar."""
        if (name, modality) not in self._energies:
            self.of(name, modality)
        return self._energies[name, modality]
