# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What stands around a model and is none of its parts."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where it was given compiled or distributed over processes.

    Its names are those that it has by itself, and it has a config.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (DataParallel, DistributedDataParallel)):
            inner = inner.module
        else:
            return inner
