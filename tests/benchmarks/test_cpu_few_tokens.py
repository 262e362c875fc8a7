# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark of few tokens on a CPU runs, and says what it measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cpu_few_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("cpu_few_tokens")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.mark.skipif(
    cpu_lowering.engine().engine is CpuEngine.REFERENCE, reason="no C++ kernels"
)
def test_what_it_writes(cpu_few_tokens, tmp_path) -> None:
    path = tmp_path / "found.json"
    cpu_few_tokens.main(["--quick", "--threads", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert list(found["seconds"]) == list(cpu_few_tokens.OURS)
    for name, times in found["seconds"].items():
        assert list(times) == ["1", "17"]
        for count, seconds in times.items():
            bytes_read = 3 * 2048 * 11008 * (1 if name == "w8a8" else 0.5)
            assert found["GB/s"][name][count] == pytest.approx(
                bytes_read / seconds / 1e9
            )
