# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the command hands to ``export_decoder``, which has tests of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import batch, quantized, qwen25_vl

import torchao_masquant.deploy as deploy
from torchao_masquant import MASQuantLinear, save_quantized
from torchao_masquant.__main__ import main

SAMPLE = batch([21, "image", 22])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "quantized"
    model = quantized(
        qwen25_vl(layers=1), scheme="w4a8", rank=2, alpha=0.5, separation=1.0
    )
    save_quantized(model, folder)
    save_file(SAMPLE, folder.parent / "inputs.safetensors")
    return folder


@pytest.fixture
def exported(monkeypatch):
    calls: list[tuple[Any, ...]] = []

    def export(model: Any, sample: Any, folder: Path, *, kernels: str) -> Path:
        calls.append((model, sample, kernels))
        folder.mkdir()
        (folder / "decoder.pt2").write_bytes(b"12345")
        return folder

    monkeypatch.setattr(deploy, "export_decoder", export)
    return calls


def test_a_saved_model_and_its_inputs(saved, exported, tmp_path, capsys):
    inputs = str(saved.parent / "inputs.safetensors")
    target = tmp_path / "package"
    arguments = ["export", str(saved), str(target), "--inputs", inputs]
    assert main([*arguments, "--kernels", "aten", "--json"]) == 0
    ((model, sample, kernels),) = exported
    assert kernels == "aten" and not model.training
    assert any(isinstance(m, MASQuantLinear) for m in model.modules())
    assert set(sample) == set(SAMPLE)
    assert all(torch.equal(sample[name], SAMPLE[name]) for name in SAMPLE)
    found = json.loads(capsys.readouterr().out)
    assert found == {"folder": str(target), "bytes": {"decoder.pt2": 5}}


def test_what_is_missing(saved, tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main(["export", *arguments]) == 1
        return capsys.readouterr().err

    target = str(tmp_path / "package")
    assert "has no config.json" in said(str(tmp_path), target)
    assert "knows text, vision: give --inputs" in said(str(saved), target)
    assert "there.safetensors" in said(
        str(saved), target, "--inputs", str(tmp_path / "there.safetensors")
    )
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "config.json"
    other.write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    assert "names NoSuchModel, which transformers does not have" in said(
        str(other.parent), target
    )
    assert not (tmp_path / "package").exists()
