# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears and experts under ``torch.autocast``, as ``torch.nn.functional.linear``.

The input is cast to autocast's type, and so is what is returned. float64 is left alone,
as autocast leaves it everywhere. The weight is not: its integers and scales have types
of their own. Inside, autocast is off, so that what an implementation sums in float32 is
summed in float32.
"""

from typing import Any, Callable, Optional

import torch

from torchao_masquant.kernels.library import _LIB

__all__ = ["register"]


def _under_autocast(name: str, device_type: str) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, *others: Optional[torch.Tensor]) -> torch.Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.masquant, name)(x, *others)

    return call


def register() -> None:
    """Tell autocast of the devices that have kernels of ours."""
    keys: dict[str, Any] = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
    for device_type, key in keys.items():
        for name in ("linear", "expert_linear"):
            _LIB.impl(name, _under_autocast(name, device_type), key)


register()
