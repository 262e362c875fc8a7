# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibration statistics, and a bounded sample of the tokens themselves."""

import torch
from torch import nn

from torchao_masquant.calibration.session import (
    CalibrationSession,
    MASQuantObservedLinear,
)
from torchao_masquant.routing import Router

__all__ = ["TokenSession"]


class _Reservoir:
    """A uniform sample of at most ``size`` of the rows that it was shown."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.rows: torch.Tensor = torch.empty(0, 0)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rows: torch.Tensor) -> None:
        # Every row draws a number; those with the smallest numbers stay.
        keys = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if self.rows.numel():
            rows = torch.cat([self.rows, rows])
            keys = torch.cat([self._keys, keys])
        keep = keys.argsort()[: self.size]
        # A copy: a view would hold all rows in memory.
        self.rows, self._keys = rows[keep.to(rows.device)], keys[keep]


class TokenSession(CalibrationSession):
    """A :class:`CalibrationSession` that also keeps some tokens of each input.

    Args:
        linears: name in the model to module.
        router: tells the modality of each token of a call.
        tokens: at most so many of each modality and input; the same ones every time.
    """

    def __init__(self, linears: dict[str, nn.Linear], router: Router, tokens: int):
        super().__init__(linears, router, second_moments=True)
        self._tokens = tokens
        self._reservoirs: dict[str, list[_Reservoir]] = {}

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, linear: MASQuantObservedLinear, x: torch.Tensor) -> None:
        super().observe(linear, x)
        name = linear.fqn
        if self.leaders[name] != name or name in self.left_out:
            return
        ids = self.router.ids_for(name, x)
        x = x.reshape(-1, x.shape[-1])
        reservoirs = self._reservoirs.setdefault(
            name,
            [_Reservoir(self._tokens, seed=i) for i in range(len(self.modalities))],
        )
        for index, reservoir in enumerate(reservoirs):
            if ids is not None:
                reservoir.add(x[ids.reshape(-1) == index])
            elif index == 0:
                reservoir.add(x)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, base first."""
        return self.router.modalities

    def tokens(self, leader: str, index: int) -> torch.Tensor:
        """(T, K) tokens of one modality that reached one input, in their own type."""
        return self._reservoirs[leader][index].rows
