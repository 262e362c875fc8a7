# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A plain ``from_pretrained`` of a quantized folder, where nobody imported the package.

Installed, torch's entry points bring it in; where they do not run, or it is not
installed, transformers stops. It must not go on with random weights.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tiny_models
import torch
from torchao.quantization import quantize_

import torchao_masquant_autoload
from torchao_masquant import MASQuantConfig, MASQuantHfConfig
from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

LOAD = """
import importlib
import sys
importlib.import_module(sys.argv[2])
import torch
assert "torchao_masquant" not in sys.modules
from transformers import AutoModelForImageTextToText
assert "torchao_masquant" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
linear = model.model.language_model.layers[0].mlp.up_proj
print(type(linear).__name__, linear.weight.qdata.sum(dtype=torch.int64).item())
"""


def load(
    folder: Path, *, installed: bool, first: str = "torch"
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(installed))}
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), first],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.qwen25_vl(layers=1)
    quantize_(model, MASQuantConfig(step="convert", method="rtn", scheme=request.param))
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    "first", ["torch", "transformers.quantizers.auto", "transformers.modeling_utils"]
)
def test_installed_it_loads(saved, first):
    """Whichever module imports torch."""
    model, folder = saved
    done = load(folder, installed=True, first=first)
    assert done.returncode == 0, done.stderr[-2000:]
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    total = weight.qdata.sum(dtype=torch.int64).item()
    assert done.stdout.split() == ["MASQuantLinear", str(total)]


def test_not_installed_it_stops(saved):
    """8-bit integers have the shape of the weight that they stand for."""
    done = load(saved[1], installed=False)
    assert done.returncode != 0 and not done.stdout
    assert "mismatch" in done.stderr and "got masquant" in done.stderr


def test_experts_stop_it_too(tmp_path):
    model = tiny_models.qwen3_vl_moe(layers=1)
    quantize_(model, MASQuantConfig(step="convert", method="rtn"))
    model.save_pretrained(tmp_path)
    done = load(tmp_path, installed=False)
    assert done.returncode != 0 and "mismatch" in done.stderr


def test_the_entry_point_is_declared():
    found = {e.name: e.value for e in entry_points(group="torch.backends")}
    assert found["masquant"] == "torchao_masquant_autoload:register"


def test_the_package_takes_the_stand_ins_place(monkeypatch):
    from transformers.quantizers import auto

    for mapping, ours in (
        ("AUTO_QUANTIZATION_CONFIG_MAPPING", MASQuantHfConfig),
        ("AUTO_QUANTIZER_MAPPING", MASQuantHfQuantizer),
    ):
        assert getattr(auto, mapping)["masquant"] is ours
    # Afterwards it changes nothing.
    torchao_masquant_autoload.register()
    assert auto.AUTO_QUANTIZER_MAPPING["masquant"] is MASQuantHfQuantizer
