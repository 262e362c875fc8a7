# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""PEFT's adapters around a model: put on before calibration, or after quantization."""

import pytest
import torch
from linear_oracle import assert_routed, recorded
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import BOS, batch, qwen25_vl, samples, true_ids, words
from torchao.quantization import quantize_

from torchao_masquant import calibrate, masquant_config

INPUTS = batch([BOS, *words(3), "image", 11])
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
KINDS = {
    "lora": LORA,
    "ia3": IA3Config(
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def assert_generates_routed(model, ids):
    with recorded(model) as calls:
        model.generate(**INPUTS, suppress_tokens=list(range(10)), **GREEDY)
    assert len(calls) == 3 * 14
    assert_routed(calls[:14], ids)
    assert_routed(calls[14:], torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_around_a_quantized_model(vl, kind):
    ids, wanted = true_ids(vl, INPUTS), vl(**INPUTS).logits
    adapted = get_peft_model(vl, KINDS[kind])
    with recorded(adapted) as calls:
        found = adapted(**INPUTS).logits
    assert_routed(calls, ids, linears=14)
    if kind == "lora":
        # It begins as no change.
        assert torch.equal(found, wanted)
    assert_generates_routed(adapted, ids)


def test_before_calibration():
    """All ways into it: the adapters', and past them."""
    model = get_peft_model(qwen25_vl(), LORA)
    options = {"scheme": "w4a8", "exclude": "*.lora_*", "progress": False}
    recipe = calibrate(model, samples(audio=False), **options)
    quantize_(model, masquant_config(recipe))
    ids = true_ids(model, INPUTS)
    for called in (model, model.base_model, model.base_model.model):
        with recorded(called) as calls:
            called(**INPUTS)
        assert_routed(calls, ids, linears=14)
        assert_generates_routed(called, ids)
