# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``tune``, with nothing to run on: what it asks for and what it prints."""

from pathlib import Path
from types import SimpleNamespace

import torch

import torchao_masquant.cli.tune as command
import torchao_masquant.gpu_tuning
from torchao_masquant.__main__ import main
from torchao_masquant.kernels.gpu.launching import TileConfig


def test_a_model_is_loaded_on_the_gpu_and_measured(monkeypatch, capsys):
    loaded, asked = {}, {}
    monkeypatch.setattr(command, "resolve_device", lambda name: torch.device(name))
    monkeypatch.setattr(command, "load_config", lambda name, trust: name)

    def load(name, config, arguments):
        loaded.update(name=name, device=torch.device(arguments.device))
        return "model"

    def tune(model, tokens, *, again, tell):
        asked.update(model=model, tokens=tokens, again=again)
        question = SimpleNamespace(kernel="int_linear w8", key="16x32x64")
        tell(SimpleNamespace(question=question, entry=TileConfig.of(4, 2, BLOCK_M=16)))
        return Path("table.json")

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr(torchao_masquant.gpu_tuning, "tune_kernels", tune)
    words = ["tune", "folder", "--device", "cuda:1", "--tokens", "2", "16", "--again"]
    assert main(words) == 0
    assert loaded["name"] == "folder" and loaded["device"] == torch.device("cuda:1")
    assert asked == {"model": "model", "tokens": [2, 16], "again": True}
    said = capsys.readouterr()
    assert said.out == "Wrote table.json\n"
    assert said.err.startswith("int_linear w8 16x32x64: TileConfig(")
