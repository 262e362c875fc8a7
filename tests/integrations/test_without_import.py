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

# Imports what it is told to, and loads folders. A process takes long to import torch and
# transformers, so that all that one can tell is asked of it.
LOAD = """
import importlib
import sys
first, *folders = sys.argv[1:]
importlib.import_module(first)
heavy = ("transformers", "torchao.prototype.safetensors", "accelerate")
if first == "torchao_masquant":
    ours = sys.modules[first]
    assert not [name for name in heavy if name in sys.modules]
    assert ours.MASQuantHfConfig.__name__ == "MASQuantHfConfig"
    assert ours.save_quantized.__name__ == "save_quantized"
import torch
from transformers import AutoModelForImageTextToText
assert ("torchao_masquant" in sys.modules) == (first == "torchao_masquant")
for folder in folders:
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
        continue
    linear = model.model.language_model.layers[0].mlp.up_proj
    print(type(linear).__name__, linear.weight.qdata.sum(dtype=torch.int64).item())
if "torchao_masquant" in sys.modules:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    assert AUTO_QUANTIZER_MAPPING["masquant"].__name__ == "MASQuantHfQuantizer"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("torchao_masquant")]
"""


def load(*folders: Path, installed: bool, first: str = "torch") -> list[str]:
    """What the process prints: a line for each folder."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(installed))}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, first, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders, and the model in each."""
    found = {}
    for scheme in ("w8a8", "w4a8"):
        model = tiny_models.qwen25_vl(layers=1)
        quantize_(model, MASQuantConfig(step="convert", method="rtn", scheme=scheme))
        folder = tmp_path_factory.mktemp(scheme)
        model.save_pretrained(folder)
        found[folder] = model
    return found


@pytest.mark.parametrize(
    "first", ["torch", "transformers.quantizers.auto", "torchao_masquant"]
)
def test_installed_it_loads(saved, first):
    """Whichever module imports torch; ours brings nothing heavy along."""
    totals = [
        model.model.language_model.layers[0].mlp.up_proj.weight.qdata.sum(
            dtype=torch.int64
        )
        for model in saved.values()
    ]
    expected = [f"MASQuantLinear {total.item()}" for total in totals]
    assert load(*saved, installed=True, first=first) == expected


def test_not_installed_it_stops(saved, tmp_path):
    """8-bit integers have the shape of the weight that they stand for; and experts."""
    model = tiny_models.qwen3_vl_moe(layers=1)
    quantize_(model, MASQuantConfig(step="convert", method="rtn"))
    model.save_pretrained(tmp_path)
    told = load(*saved, tmp_path, installed=False)
    assert len(told) == 3
    for line in told:
        assert "Linear" not in line and "mismatch" in line


def test_the_entry_point_is_declared():
    found = {e.name: e.value for e in entry_points(group="torch.backends")}
    assert found["masquant"] == "torchao_masquant_autoload:register"


def test_the_package_takes_the_stand_ins_place():
    from transformers.quantizers import auto

    for mapping, ours in (
        ("AUTO_QUANTIZATION_CONFIG_MAPPING", MASQuantHfConfig),
        ("AUTO_QUANTIZER_MAPPING", MASQuantHfQuantizer),
    ):
        assert getattr(auto, mapping)["masquant"] is ours
    # Afterwards it changes nothing.
    torchao_masquant_autoload.register()
    assert auto.AUTO_QUANTIZER_MAPPING["masquant"] is MASQuantHfQuantizer
