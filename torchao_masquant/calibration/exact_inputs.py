# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What linears read in full precision, while they are observed behind quantized ones."""

import contextlib
from typing import Iterator

import torch

__all__ = ["ExactInputs"]


class ExactInputs:
    """The inputs of linears in the full-precision stream, of one sample at a time."""

    def __init__(self) -> None:
        #: whether the stream that runs is the full-precision one
        self.is_read = False
        self._inputs: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Note what linears are called with inside, in place of the sample before."""
        self._inputs.clear()
        self.is_read = True
        try:
            yield
        finally:
            self.is_read = False

    def note(self, name: str, x: torch.Tensor) -> None:
        """Keep the input of a linear."""
        self._inputs[name] = x.detach()

    def of(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """(T, K) what a linear read.

        Args:
            name: of the linear.
            rows: (T, K) what it reads in the quantized stream.

        Raises:
            ValueError: it was not called, or with other tokens.
        """
        found = self._inputs.get(name)
        if found is None or found.numel() != rows.numel():
            raise ValueError(
                f"{name} is called with other tokens where the linears before it are "
                "quantized, so that nobody can tell what they cost it: exclude it, or "
                "calibrate with asymmetric_calibration=False."
            )
        return found.reshape(rows.shape)
