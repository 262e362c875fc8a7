# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Samples on a model's device, in its type."""

from collections.abc import Sequence
from typing import Any, Mapping

import torch
from torch import nn

from torchao_masquant.data.lazy_samples import LazySamples

__all__ = ["PlacedSamples"]


class PlacedSamples(LazySamples):
    """Samples, each of which is moved when it is asked for.

    Args:
        samples: dicts of a model's keyword inputs.
        model: its first parameter tells the device, its ``dtype``, where it has one,
            the type of floating point inputs.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]], model: nn.Module):
        self.samples = samples
        self.device = next(model.parameters()).device
        self.dtype = getattr(model, "dtype", None)

    @classmethod
    def of_type(
        cls, samples: Sequence[Mapping[str, Any]], dtype: torch.dtype
    ) -> "PlacedSamples":
        """Samples on the CPU, for a model of this type that is not loaded."""
        placed = cls.__new__(cls)
        placed.samples, placed.dtype = samples, dtype
        placed.device = torch.device("cpu")
        return placed

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int) -> dict[str, Any]:
        return {
            name: value.to(
                self.device, self.dtype if value.is_floating_point() else None
            )
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.samples[index].items()
        }
