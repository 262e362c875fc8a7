# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where a visit is: on a GPU, or in a dry run, which has the CPU pose as one."""

import os
from typing import Any, Callable

import torch
from gpu_bench.candidates import Bench
from gpu_bench.plan import Step
from gpu_linear import gpu_builder

__all__ = ["DRY_RUN", "begin", "device", "is_dry", "linear_builder"]

#: "short" or "whole": a dry run without or with what needs a C++ compiler
DRY_RUN = "DRY_RUN"


def is_dry() -> str:
    """Which dry run it is; empty for none."""
    return os.environ.get(DRY_RUN, "")


def begin() -> None:
    """Called first in every process of a visit."""
    torch.set_grad_enabled(False)
    if is_dry():
        from gpu_visit import pretence

        pretence.begin()


def device() -> torch.device:
    """The one that is visited."""
    if is_dry():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def linear_builder(step: Step) -> Bench:
    """Ours are called as they are, which launches the same kernels as a compiled graph;

    torchao's are compiled, but not tuned: both take minutes otherwise.
    """

    def compile(function: Any, mode: str = "", **how: Any) -> Callable[..., Any]:
        if mode and is_dry() != "short":
            return torch.compile(function, **how)
        return function

    return gpu_builder(step, device(), compile)
