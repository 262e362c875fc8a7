# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Exported programs whose operators need none of our Python."""

import functools
import importlib
import logging
from typing import Any, Optional

import torch
from torch.export import ExportedProgram

from torchao_masquant.kernels import cpu_lowering, reference
from torchao_masquant.kernels.cpu_engine import CpuEngine
from torchao_masquant.kernels.library import LOWERED
from torchao_masquant.kernels.shared_prologue import merge_equal_calls

__all__ = ["KERNELS", "choose_kernels", "lower"]

_LOGGER = logging.getLogger(__name__)

#: "cpu": our C++ kernels, which travel beside the package; "triton": our kernels for
#: GPUs, which are compiled into it; "aten": none of ours.
KERNELS = ("cpu", "triton", "aten")


def choose_kernels(kernels: str, device: torch.device) -> str:
    """Which kernels a program for a device is to call.

    Args:
        kernels: one of :data:`KERNELS`, or "auto", ours where they run; one warning
            tells where they do not.
        device: of the program.

    Raises:
        ValueError: there are no such kernels, or they do not run here.
    """
    if kernels not in ("auto", *KERNELS):
        raise ValueError(
            f"unknown kernels {kernels!r}: choose one of auto, {', '.join(KERNELS)}."
        )
    own = "cpu" if device.type == "cpu" else "triton"
    if kernels == "aten":
        return kernels
    reason: Optional[str] = f"the program is for {device.type}"
    if kernels in ("auto", own):
        reason = _why_no_cpu() if own == "cpu" else _why_no_triton(device)
    if reason is None:
        return own
    if kernels == "auto":
        _LOGGER.warning(
            "the program will call operators of torch alone, which are slower than our "
            "kernels: %s.",
            reason,
        )
        return "aten"
    raise ValueError(
        f"kernels={kernels!r} cannot be ({reason}): choose 'aten', which runs everywhere."
    )


def _why_no_cpu() -> Optional[str]:
    choice = cpu_lowering.prepare()
    return choice.reason if choice.engine is CpuEngine.REFERENCE else None


def _why_no_triton(device: torch.device) -> Optional[str]:
    if device.type != "cuda":
        return f"there are none for {device.type}"
    try:
        gpu = importlib.import_module("torchao_masquant.kernels.gpu_lowering")
    except ImportError as error:
        return str(error)
    return gpu.why_reference(device)


def lower(program: ExportedProgram, kernels: str = "cpu") -> ExportedProgram:
    """Desugar the quantized linears of a program, down to operators that stay.

    Its weights become plain tensors, and linears that share an input quantize it once.

    Args:
        program: exported, with ``masquant::linear`` calls or none.
        kernels: "cpu": ``masquant_cpu::`` operators, which the library of the C++
            kernels defines wherever it is loaded; "triton": ``masquant::`` operators
            still, which become Triton kernels where the program is compiled; "aten":
            the formulas of :mod:`torchao_masquant.kernels.reference`, operator by
            operator.

    Returns:
        The program that is to be compiled.
    """
    if kernels == "aten":
        return program.run_decompositions(
            {
                getattr(torch.ops.masquant, name).default: getattr(reference, name)
                for name in LOWERED
            }
        )
    lowered = program.run_decompositions({})
    graph = lowered.graph
    merge_equal_calls(graph)
    if kernels == "cpu":
        ours = _cpu_operators()
        for node in graph.nodes:
            node.target = ours.get(node.target, node.target)
    lowered.graph_module.recompile()
    return lowered


@functools.lru_cache(maxsize=None)
def _cpu_operators() -> dict[Any, Any]:
    """Each operator's namesake in the library, with shapes for the compiler."""
    cpu_lowering.prepare()
    found = {}
    for name in LOWERED:
        public = getattr(torch.ops.masquant, name).default
        # Under fake tensors this is the public operator's own fake implementation.
        torch.library.register_fake(f"masquant_cpu::{name}", public)
        found[public] = getattr(torch.ops.masquant_cpu, name).default
    return found
