# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a block takes, counted, against what it was estimated to take."""

import importlib
import weakref

import pytest
import tiny_models
import torch
from results import FIXED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchao_masquant.conductor.asymmetric import AsymmetricConductor
from torchao_masquant.learning.learn import BlockTask
from torchao_masquant.sequential import calibrate_sequential, preflight


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside, those kept for gradients with them.

    Attributes:
        peak: of those that were there at a time.
    """

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if type(tensor) is torch.Tensor:
                self.add(tensor.untyped_storage())
        return output

    def add(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def gone(_):
            del self.known[key]
            self.bytes -= size

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def samples_of(words):
    found = tiny_models.samples(audio=False, count=2)
    for sample in found:
        more = torch.full((1, words), 20)
        more[:, ::3] += 7
        sample["input_ids"] = torch.cat([sample["input_ids"], more], 1)
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    return found


def estimated_and_counted(folder, monkeypatch, owner, method, words, **options):
    """Of a model of one block: the estimate, and the peak inside of a method."""
    estimates, peaks = [], []
    module = importlib.import_module("torchao_masquant.sequential.run")
    original = getattr(owner, method)

    def estimate(**sizes):
        estimates.append(preflight.estimate(**sizes))
        return estimates[-1]

    def counted(*arguments):
        with Live() as live:
            found = original(*arguments)
        peaks.append(live.peak)
        return found

    monkeypatch.setattr(module, "estimate", estimate)
    monkeypatch.setattr(owner, method, counted)
    calibrate_sequential(
        folder / "model",
        samples_of(words),
        recipe=folder / "recipe.safetensors",
        **{**FIXED, **options},
    )
    (needs,), (peak,) = estimates, peaks
    return needs, peak


@pytest.mark.parametrize("inner, words", [(512, 0), (512, 3000)])
def test_so_are_two_streams(tmp_path, monkeypatch, inner, words):
    tiny_models.qwen25_vl_of_width(64, inner, 1).save_pretrained(tmp_path / "model")
    needs, peak = estimated_and_counted(
        tmp_path,
        monkeypatch,
        AsymmetricConductor,
        "layers",
        words,
        asymmetric_calibration=True,
        rank=0,
    )
    assert peak <= needs.statistics + max(needs.solver, needs.forward) <= 2 * peak


@pytest.mark.parametrize(
    "hidden, inner, words, options",
    [
        (256, 512, 0, {}),
        (256, 512, 0, {"scheme": "w4a16", "group_size": 16}),
        (256, 512, 0, {"rank": "auto", "low_rank_bits": 8}),
        (64, 96, 400, {}),
        (64, 96, 400, {"rank": 0.5, "dtype": torch.bfloat16, "batch_size": 2}),
    ],
    ids=["weights", "groups", "auto", "tokens", "pairs"],
)
def test_it_is_estimated_from_above(
    tmp_path, monkeypatch, hidden, inner, words, options
):
    """And by no more than twice."""
    tiny_models.qwen25_vl_of_width(hidden, inner, 1).save_pretrained(tmp_path / "model")
    needs, peak = estimated_and_counted(
        tmp_path, monkeypatch, BlockTask, "learn", words, epochs=1, **options
    )
    assert peak <= needs.learning <= 2 * peak
    assert needs.device >= needs.block + needs.learning
