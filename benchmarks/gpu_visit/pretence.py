# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The CPU as a GPU: what a dry run replaces of PyTorch, and nothing of ours but clocks.

The kernels run in Triton's interpreter, called by the operators on CPU tensors as they
are on a GPU's. Times are those of the CPU, or made up.
"""

import os
import time
from types import SimpleNamespace
from typing import Any, Callable, Sequence

import torch

__all__ = ["CARD", "begin"]

CARD = "NVIDIA H200 of a dry run"


class _Graph:
    """Calls that were captured are called."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self._calls = calls

    def replay(self) -> None:
        for call in self._calls:
            call()


class _Event:
    def __init__(self, enable_timing: bool = False):
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end._at - self._at)


def _clock(call: Callable[[], Any]) -> float:
    """Milliseconds that are made up."""
    return 1.0


def begin() -> None:
    """Replace what asks for a GPU, for the rest of this process."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    from gpu_bench import timing
    from quick_interpreter import spare_repeated_work

    from torchao_masquant.kernels.gpu import measuring, tuning
    from torchao_masquant.kernels.gpu.operators import operators
    from torchao_masquant.kernels.library import _LIB, LOWERED

    spare_repeated_work()

    def run(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            operators()[name].check(*args)
            return operators()[name].run(*args)

        return call

    for name in LOWERED:
        _LIB.impl(name, run(name), "CPU")
    timing.captured = _Graph  # type: ignore[assignment]
    timing._WARM_UP, timing._ROUNDS = 0.0, 1
    measuring.gpu_clock = _clock
    for module in (measuring, tuning):
        module.table_name = lambda device: "sm_dry"  # type: ignore[assignment]
    properties = SimpleNamespace(
        L2_cache_size=1024, total_memory=1 << 30, multi_processor_count=1
    )
    for name, value in {
        "Event": _Event,
        "synchronize": lambda: None,
        "get_device_name": lambda: CARD,
        "get_device_properties": lambda device: properties,
        "empty_cache": lambda: None,
    }.items():
        setattr(torch.cuda, name, value)
