# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The optimizer of each leg of the training."""

import math

import torch
from torch import nn


class Optimizer:
    """AdamW with a warm-up, a cosine decay and clipped gradients."""

    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, steps: int
    ) -> None:
        def factor(step: int) -> float:
            warm_up = min(1.0, (step + 1) / 40)
            return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))

        self.parameters = parameters
        self.adamw = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, factor)

    def step(self) -> None:
        """Apply and clear the accumulated gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()
