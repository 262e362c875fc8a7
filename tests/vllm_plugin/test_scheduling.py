# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tokens are what they are however vLLM schedules their requests.

That it would show if images were taken for text is in ``test_served.py``.
"""

import glm_folders
import pytest
import qwen_folders
import torch
from safetensors.torch import save_file
from subject import Subject
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    "settings, counter",
    [
        # A request that finds no place begins again later, with what it has written.
        (
            {
                "num_gpu_blocks_override": 10,
                "max_model_len": 256,
                "sampling": {"max_tokens": 40},
            },
            "vllm:num_preemptions",
        ),
        # Steps have more rows than tokens come of them.
        (
            {
                "speculative_config": {**_DRAFTS, "prompt_lookup_min": 1},
                "sampling": {"max_tokens": 40},
            },
            "vllm:spec_decode_num_accepted_tokens",
        ),
        # Answers share a prompt's blocks, and go on at random.
        (
            {"seed": 1, "sampling": {"n": 3, "temperature": 1}},
            "vllm:prefix_cache_hits",
        ),
    ],
    ids=["preempted", "speculative", "several answers"],
)
def test_a_request_that_is(seeing, tmp_path, settings, counter):
    answers = seeing.asked(tmp_path / "answers.json", enforce_eager=True, **settings)
    assert seeing.counters[counter] > 0
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert max(seeing.log_probability_differences(answers)) < 0.05


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    return Subject(folder, "w8a8", with_images=False, make=qwen_folders.llama)


def _eagle_head(folder, dense):
    """An EAGLE's layer for a Llama, which is random."""
    config = LlamaConfig.from_pretrained(dense, num_hidden_layers=1)
    torch.manual_seed(0)
    known = LlamaForCausalLM(config).model.layers.state_dict()
    layer = {f"layers.{name}": tensor for name, tensor in known.items()}
    # The layer has none.
    del layer["layers.0.input_layernorm.weight"]
    width = config.hidden_size
    layer["fc.weight"] = torch.randn(width, 2 * width) * width**-0.5
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(layer, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_quantized_model_that_drafts_for_itself(reading, tmp_path):
    drafts = {"method": "draft_model", "model": str(reading.folder)}
    answers = reading.asked(
        tmp_path / "answers.json",
        enforce_eager=True,
        speculative_config={**drafts, "num_speculative_tokens": 3},
    )
    assert reading.differences(answers) == []
    drafted = reading.counters["vllm:spec_decode_num_draft_tokens"]
    assert reading.counters["vllm:spec_decode_num_accepted_tokens"] > 0.9 * drafted > 0


def test_a_quantized_model_that_an_eagle_drafts_for(reading, tmp_path):
    head = _eagle_head(tmp_path / "head", reading.dense)
    answers = reading.asked(
        tmp_path / "answers.json",
        enforce_eager=True,
        speculative_config={
            "method": "eagle",
            "model": str(head),
            "num_speculative_tokens": 3,
        },
    )
    assert reading.differences(answers) == []
    assert reading.counters["vllm:spec_decode_num_draft_tokens"] > 0


def test_a_layer_that_predicts_a_further_token_goes_along(tmp_path):
    """It is not quantized, and changes nothing of what is written."""
    seeing = Subject(
        tmp_path,
        "w8a8",
        with_images=True,
        image=glm_folders.SIGHT,
        make=glm_folders.glm_ocr,
    )
    alone, drafted = (
        seeing.asked(tmp_path / f"{name}.json", enforce_eager=True, **options)
        for name, options in (
            ("alone", {}),
            (
                "drafted",
                {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
            ),
        )
    )
    assert [a["tokens"] for a in drafted] == [a["tokens"] for a in alone]
    assert seeing.counters["vllm:spec_decode_num_accepted_tokens"] > 0
