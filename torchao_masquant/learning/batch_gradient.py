# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The gradient of the mean loss of a batch, whose samples several processes share."""

from typing import Sequence

import torch

from torchao_masquant.learning.together import Together

__all__ = ["BatchGradient"]


class BatchGradient:
    """Adds up gradients of single samples in float64.

    What processes add up is what one would, to the rounding of float64; and, but for
    values next to a tie, the same bits in the parameters' type.

    Args:
        parameters: all on one device.
        together: the processes.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], together: Together):
        self.parameters, self.together = parameters, together
        values = sum(p.numel() for p in parameters)
        # Behind the sums: how many samples there are with a gradient of each.
        self._sums = torch.zeros(
            values + len(parameters),
            dtype=torch.float64,
            device=parameters[0].device,
        )
        *self._parts, self._counts = self._sums.split(
            [*(p.numel() for p in parameters), len(parameters)]
        )

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of one sample's loss, which may depend on no parameter."""
        if not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for index, gradient in enumerate(found):
            if gradient is not None:
                self._parts[index].add_(gradient.reshape(-1))
                self._counts[index] += 1

    def finish(self, samples: int) -> None:
        """Let ``grad`` of the parameters be the mean over a batch, and start anew.

        It is None where no sample of any process has a gradient.

        Args:
            samples: of the batch, in all processes.
        """
        self.together.add(self._sums)
        for p, part, count in zip(self.parameters, self._parts, self._counts.tolist()):
            p.grad = (part / samples).to(p.dtype).view_as(p) if count else None
        self._sums.zero_()
