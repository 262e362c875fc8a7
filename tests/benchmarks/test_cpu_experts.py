# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of experts on a CPU runs, and says what it measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cpu_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("cpu_experts")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.mark.skipif(
    cpu_lowering.engine().engine is CpuEngine.REFERENCE, reason="no C++ kernels"
)
def test_what_it_writes(cpu_experts, tmp_path) -> None:
    path = tmp_path / "found.json"
    cpu_experts.main(["--quick", "--threads", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    names = [f"{s}, {w}" for s in cpu_experts.SCHEMES for w in cpu_experts.WAYS]
    assert list(found["seconds"]) == list(found["GB/s"]) == names
    # One token meets two experts of 2 x 32 by 64 and 64 by 32.
    for name in names:
        bytes_read = 2 * 3 * 32 * 64 * (1 if "w8" in name else 0.5)
        seconds = found["seconds"][name]["1"]
        assert found["GB/s"][name]["1"] == pytest.approx(bytes_read / seconds / 1e9)
