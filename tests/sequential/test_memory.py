# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model several times larger than the memory that a process may take."""

import ctypes
import resource
import threading
from pathlib import Path

import killed_runs
import pytest
import tiny_models
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from torchao_masquant import calibrate
from torchao_masquant.sequential import calibrate_sequential

MIB = 1 << 20
HIDDEN, INNER, LAYERS = 512, 2048, 20
#: Of memory that is private to the process and can be written to: heap, stacks of threads,
#: and mappings of files such as weights.
LIMIT = 96 * MIB
_M_MMAP_THRESHOLD = -3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """310 MiB of float32, a file for each block."""
    folder = tmp_path_factory.mktemp("large") / "model"
    model = tiny_models.qwen25_vl_of_width(HIDDEN, INNER, LAYERS)
    model.save_pretrained(folder, max_shard_size="16MB")
    return folder


def limited(function, original, folder):
    """Run a function in a process that may take so much more than it has."""
    torch.set_num_threads(1)
    # A stack of 8 MiB for each thread that loads a file is no part of the claim.
    threading.stack_size(MIB)
    # Nor are holes in the heap of pages that are not there: what is freed is unmapped.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            bound = 1024 * int(line.split()[1]) + LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    function(original, folder)


def from_disk(original, folder):
    calibrate_sequential(
        original,
        tiny_models.samples(audio=False, count=2),
        output=folder / "quantized",
        method="smoothquant",
        progress=False,
    )


def in_memory(original, folder):
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(original)
        samples = tiny_models.samples(audio=False, count=2)
        calibrate(model, samples, method="smoothquant", progress=False)
    except (RuntimeError, MemoryError, OSError):
        (folder / "too large").touch()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone")
@pytest.mark.parametrize(
    "function, left", [(from_disk, "quantized"), (in_memory, "too large")]
)
def test_under_a_limit(original, tmp_path, function, left):
    assert sum(f.stat().st_size for f in original.iterdir()) > 3 * LIMIT
    process = killed_runs.context().Process(
        target=limited, args=(function, original, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == [left]
