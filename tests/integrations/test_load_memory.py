# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What loading takes at its peak, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_
from transformers import Qwen2Config, Qwen2ForCausalLM

from torchao_masquant import MASQuantConfig

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is read from /proc"
)

LAYERS, WIDTH = 12, 512

_PEAK = r"""
import re, sys, threading, time
import torch, torchao_masquant
from torchao_masquant import MASQuantConfig, MASQuantHfConfig
from transformers import AutoModelForCausalLM

def status(key):
    with open("/proc/self/status") as file:
        return int(re.search(key + r":\s+(\d+) kB", file.read())[1]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, status("RssAnon"))

def load(folder):
    options = {}
    if sys.argv[1] == "quantizing":
        config = MASQuantConfig(step="convert", method="rtn")
        options["quantization_config"] = MASQuantHfConfig(config=config)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    # Read every byte: a file that is mapped to memory takes none before.
    for tensor in model.state_dict().values():
        if isinstance(tensor, torchao_masquant.MASQuantTensor):
            tensor.qdata.max()
    return model

# What loading needs whatever the size is loaded once before.
load(sys.argv[3])
before, before_all, peak = status("RssAnon"), status("VmHWM"), 0
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
print(peak - before, status("VmHWM") - before_all)
"""


def _model(width: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    # Never written to, so it takes no memory here.
    return model.to_empty(device="cpu")


def _grown(how: str, folder: Path) -> tuple[int, int]:
    """Bytes that a process grows by at most: its own memory, and with the files' pages."""
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, how, folder / "large", folder / "small"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    own, total = map(int, result.stdout.splitlines()[-1].split())
    return own, total


#: Bytes of the layers' float32 weights: 201 MB.
DENSE = 4 * LAYERS * 16 * WIDTH**2


def test_loading_never_holds_full_precision(tmp_path):
    for name, width in (("large", WIDTH), ("small", 32)):
        model = _model(width)
        quantize_(model, MASQuantConfig(step="prepare_for_loading"))
        model.save_pretrained(tmp_path / name)
    on_disk = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert on_disk < 0.16 * DENSE
    _, total = _grown("loading", tmp_path)
    # The file's pages and a copy of them, and some room for the allocator.
    assert on_disk / 2 < total < 2 * on_disk + 10e6 < 0.4 * DENSE


def test_quantizing_while_loading_never_holds_full_precision(tmp_path):
    for name, width in (("large", WIDTH), ("small", 32)):
        _model(width).save_pretrained(tmp_path / name)
    # Pages of the original's file, which the system takes back when it needs them, are
    # not counted.
    own, _ = _grown("quantizing", tmp_path)
    packed, layer = DENSE / 8, DENSE / LAYERS
    assert packed < own < packed + 3 * layer < 0.4 * DENSE
