# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The ``masquant::`` operators on CUDA and ROCm: Triton kernels, seen by the compiler.

Eager calls launch the kernels. Where a graph is made functional, that is inside of
``torch.compile``, an operator on CUDA tensors is replaced by its launches, as
``torch.library.triton_op`` does with operators of its own: Inductor compiles and
caches them with the source of the kernels as part of the key, and AOTInductor packages
their binaries. It is not a ``triton_op``, which is one implementation for every device.
An exported program keeps the operators, and so runs on any device; its launches appear
when it is compiled.

Without Triton, or on a GPU that is older than its kernels ask for, one warning says so
and the reference runs.
"""

import functools
import importlib.util
import os
import warnings
from typing import Any, Callable, Optional

import torch

# These define the operators.
from torchao_masquant.kernels import float_reference as float_reference
from torchao_masquant.kernels import reference as reference
from torchao_masquant.kernels.gpu.operators import GpuOperator, operators
from torchao_masquant.kernels.library import (
    _LIB,
    LOWERED,
    LOWERED_ON_GPUS,
    function_of,
)

__all__ = ["register", "why_reference"]

#: where it is 1, eager calls measure what no table knows of them
TUNE_VARIABLE = "MASQUANT_TUNE"

_OLDEST = (8, 0)


@functools.lru_cache(maxsize=None)
def why_reference(device: torch.device) -> Optional[str]:
    """Why the kernels cannot run on a GPU; None where they can.

    Args:
        device: of type "cuda", which ROCm's are too.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    # A graph may be traced for a GPU where there is none.
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability "
                f"{capability[0]}.{capability[1]}, and they need {_OLDEST[0]}.{_OLDEST[1]}"
            )
    return None


@functools.lru_cache(maxsize=None)
def _warn(reason: str) -> None:
    warnings.warn(
        "masquant's kernels for GPUs cannot run here, so the plain and slower PyTorch "
        f"path does: {reason}.",
        stacklevel=4,
    )


def _tune(operator: GpuOperator, args: tuple[Any, ...]) -> None:
    from torchao_masquant.kernels.gpu.measuring import measure_call

    # Nothing can be timed while a CUDA graph is recorded.
    if len(args[0]) and not torch.cuda.is_current_stream_capturing():
        measure_call(operator.name, operator.launch, args)


def _eager(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        device = args[0].device
        reason = why_reference(device)
        if reason is not None:
            _warn(reason)
            return function_of(name)(*args)
        operator = operators()[name]
        operator.check(*args)
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device(device):
            if os.environ.get(TUNE_VARIABLE) == "1":
                _tune(operator, args)
            return operator.run(*args)

    return call


def _functional(name: str) -> Callable[..., Any]:
    def decompose(
        mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # The type and not the tensor's: one on another device raises below.
        device = args[0].device
        keep = (
            device.type != "cuda"
            # An export keeps operators, as it does those of triton_op.
            or not getattr(torch._functorch.config, "decompose_custom_triton_ops", True)
            or why_reference(device) is not None
        )
        if keep:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        # No argument of theirs is by keyword alone, so the dispatcher leaves none here.
        operator = operators()[name]
        operator.check(*args)
        with mode:
            return operator.run(*args)

    return decompose


def register() -> None:
    """Give the operators their kernels for CUDA, which is the name of ROCm too."""
    for name in (*LOWERED, *LOWERED_ON_GPUS):
        _LIB.impl(name, _eager(name), "CUDA")
        torch.library.register_torch_dispatch(
            f"masquant::{name}",
            torch._subclasses.functional_tensor.FunctionalTensorMode,
            _functional(name),
            lib=_LIB,
        )


register()
