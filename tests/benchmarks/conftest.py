# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What tests of several benchmarks have in common."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator

import pytest
import torch

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_quickly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], tuple[ModuleType, dict[str, Any]]]]:
    """Of the name of a benchmark of the C++ kernels: it, and what its quick run writes."""
    if cpu_lowering.engine().engine is CpuEngine.REFERENCE:
        pytest.skip("no C++ kernels")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name: str) -> tuple[ModuleType, dict[str, Any]]:
        benchmark, path = importlib.import_module(name), tmp_path / "found.json"
        benchmark.main(["--quick", "--threads", "1", "--json", str(path)])
        return benchmark, json.loads(path.read_text())

    yield run
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
