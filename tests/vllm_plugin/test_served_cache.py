# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM's cache in fp8 holds what a recipe in the folder says, and without one what it did."""

import statistics
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject import Subject

from torchao_masquant import calibrate_cache
from torchao_masquant.testing import model_folders

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

_TWO_PROCESSES = {"enforce_eager": True, "tensor_parallel_size": 2}
_HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def _with_biases(folder):
    """A Qwen2 whose keys and values have an offset, as those of published ones have."""
    with mock.patch.dict(model_folders._TEXT, _HEADS):
        model_folders.text_model(folder)
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, size in (("k", 6), ("v", 2)):
        for layer in range(2):
            bias = state[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
            bias.normal_(generator=generator).mul_(size)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    where = tmp_path_factory.mktemp("biases")
    options = {"make": _with_biases, "hadamard_size": 32}
    return Subject(where, "w8a8", with_images=False, **options)


def test_it_holds_what_the_recipe_says(subject, tmp_path):
    from vllm_bench.fp8_cache import Form, cut_off, fp8_cache

    torch.manual_seed(0)
    samples = [{"input_ids": torch.randint(10, 300, (2, 24))} for _ in range(6)]
    recipe = calibrate_cache(subject.reader, samples, progress=False)

    def wrong(form, asked=subject.asked, **options):
        """Means of differences: from an exact cache, and from one of this form."""
        answers = asked(tmp_path / "answers.json", kv_cache_dtype="fp8", **options)

        def emulated(**inputs):
            held = fp8_cache(recipe, form)
            return subject.reader(**inputs, past_key_values=held, use_cache=True)

        return [
            statistics.mean(subject.log_probability_differences(answers, model))
            for model in (None, emulated)
        ]

    theirs, same = wrong(Form(cut_off))
    assert same < theirs / 50
    # The folder that vLLM has compiled a graph for.
    recipe.save(subject.folder)
    form = Form(
        scales=lambda shared: shared.fp8_scales,
        key_center=True,
        key_factor=True,
        key_rotated=True,
    )
    ours, same = wrong(form)
    assert ours < theirs / 2 and same < ours / 20
    # Each process rounds its own columns of an input to int8.
    ours, same = wrong(form, subject.asked_of_two_processes, **_TWO_PROCESSES)
    assert ours < theirs / 2 and same < ours / 2
