# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM does not serve is said in one sentence, before anything is answered."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM
from vllm_process import told

from torchao_masquant import CacheRecipe, calibrate, masquant_config, save_quantized
from torchao_masquant.kv_cache.cache_recipe import SharedLayer
from torchao_masquant.testing import model_folders

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

_TEXT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def _said(output: Path, attempts, **environment: str) -> list[str]:
    given = [str(part) for f, o in attempts for part in (f, json.dumps(o))]
    return told("try_vllm.py", output, *given, output=output, **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("text")
    with mock.patch.dict(model_folders._TEXT, _TEXT):
        dense = model_folders.text_model(where / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    samples = [{"input_ids": torch.randint(10, 300, (2, 24))} for _ in range(4)]
    quantize_(
        model, masquant_config(calibrate(model, samples, scheme="w8a8", progress=False))
    )
    save_quantized(model, where / "quantized", beside=dense)
    return where / "quantized"


def _changed(folder: Path, name: str, change) -> Path:
    """A copy of a folder whose ``quantization_config`` is another."""
    copy = shutil.copytree(folder, folder.parent / name)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _of_another_architecture(entry) -> None:
    entry["layers"] = {
        n.replace("model.layers", "transformer.h"): f
        for n, f in entry["layers"].items()
    }


def _wider(entry) -> None:
    for form in entry["formats"]:
        form["shape"][0] *= 2


def _with_recipe(folder: Path, layers: int) -> Path:
    """A copy with a cache recipe of a decoder of so many layers."""
    copy = shutil.copytree(folder, folder.parent / f"recipe of {layers}")

    def parts():
        return [torch.ones(1, 1, 32) for _ in range(layers)]

    shared = [
        SharedLayer(*(torch.ones(1, 32) for _ in range(2)), torch.ones(2))
        for _ in range(layers)
    ]
    recipe = CacheRecipe(("text",), parts(), parts(), shared)
    recipe.save(copy)
    return copy


def test_each_is_a_sentence(folder, tmp_path):
    other = _changed(folder, "other", _of_another_architecture)
    newer = _changed(folder, "newer", lambda entry: entry.update(format_version=99))
    wider = _changed(folder, "wider", _wider)
    attempts = {
        "(masquant) does not match": (folder, {"quantization": "fp8"}),
        "reads 1 to 6: upgrade it": (newer, {}),
        "vLLM's model has no place for 14 quantized weights": (other, {}),
        "its config.json is that of another model": (wider, {}),
        "leave out --enable-lora": (folder, {"enable_lora": True}),
        "leave out --load-format dummy": (folder, {"load_format": "dummy"}),
        "quantized weights are not loaded again": (folder, {"loads_again": True}),
        "of a decoder of 3 layers, and its model has 2": (
            _with_recipe(folder, 3),
            {"kv_cache_dtype": "fp8"},
        ),
        "not served with a cache of fp8_e5m2": (
            _with_recipe(folder, 2),
            {"kv_cache_dtype": "fp8_e5m2"},
        ),
    }
    said = _said(tmp_path / "said.json", attempts.values())
    found = {
        expected: any(expected in line for line in text.splitlines())
        for expected, text in zip(attempts, said)
    }
    assert all(found.values()), list(zip(attempts, said))


def test_a_process_without_the_plugin(folder, tmp_path):
    (said,) = _said(tmp_path / "said.json", [(folder, {})], VLLM_PLUGINS="another")
    assert "Unknown quantization method: masquant" in said
