# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The built wheel alone, in an environment and a folder without the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_USE = r"""
import sys
from pathlib import Path

import torch
import torchao_masquant
from torchao.quantization import quantize_
from torchao_masquant import Recipe, calibrate, masquant_config, save_quantized
from torchao_masquant.testing import digits
from transformers import AutoModelForMultimodalLM

installed = Path(torchao_masquant.__file__)
assert Path(sys.prefix) in installed.parents, installed

model = digits.load_model("plain")
samples = digits.calibration_samples()[:4]
recipe = calibrate(
    model, samples, alpha=0.5, separation=1.0, rounding="nearest", clip=False,
    include=r"re:model\.(language_model\.)?layers\.0\..*", progress=False,
)
recipe.save("recipe.safetensors")
quantize_(model, masquant_config("recipe.safetensors"))
save_quantized(model, "quantized", max_shard_size="2MB")

loaded = AutoModelForMultimodalLM.from_pretrained("quantized")
inputs = digits.prompt("both")
with torch.no_grad():
    expected = model(**inputs).logits
    found = loaded(**inputs).logits
assert (found - expected).norm() < 0.03 * expected.norm()
layer = loaded.get_decoder().layers[0]
layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
with torch.no_grad():
    compiled = loaded(**inputs).logits
assert (compiled - expected).norm() < 0.03 * expected.norm()
print("used")
"""


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with our wheel, which sees this one's other packages."""
    folder = tmp_path_factory.mktemp("installed")
    made = folder / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(made)], folder)
    python = made / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    _run(
        [*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        folder,
    )
    # An editable install of ours in one of them has no effect: the .pth files in a
    # folder that a .pth file names are not read.
    others = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    packages = sysconfig.get_path("purelib", vars={"base": str(made)})
    Path(packages, "others.pth").write_text("\n".join(others))
    return python


def _run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_saves_loads_and_compiles(environment, tmp_path):
    assert _run([str(environment), "-c", _USE], tmp_path).splitlines()[-1] == "used"
    shards = list((tmp_path / "quantized").glob("*.safetensors"))
    assert len(shards) > 1


def test_the_wheel_brings_the_command(environment, tmp_path):
    command = environment.with_name("masquant")
    assert "masquant" in _run([str(command), "--help"], tmp_path)
