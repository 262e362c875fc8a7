# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What stands around a model and is none of its parts: what compiles it, distributes it,
or moves its weights."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["check_in_memory", "is_hooked", "unwrapped"]


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


def check_in_memory(name: str, weight: torch.Tensor, model: nn.Module) -> None:
    """Raise where a weight has no values.

    Args:
        name: of it in the model.
        weight: that is to be observed or quantized.
        model: the whole; accelerate's hooks may bring its weights in for a call.

    Raises:
        ValueError: names it and says what to do.
    """
    if not weight.is_meta:
        return
    if is_hooked(model):
        raise ValueError(
            f"{name} is offloaded, so its values are in memory during calls alone: "
            "load the model with a device_map that leaves the decoder on a device, or "
            "calibrate it from its files with "
            "torchao_masquant.sequential.calibrate_sequential; once quantized it may be "
            "offloaded."
        )
    raise ValueError(
        f"{name} is on the meta device, without values to quantize: load the model's "
        "weights first."
    )


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate moves the inputs or the weights of a model for its calls."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())
