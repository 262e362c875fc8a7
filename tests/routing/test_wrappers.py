# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Models inside what distributes them over processes or devices."""

import pytest
import torch
import torch.distributed as dist
from linear_oracle import assert_routed, recorded
from tiny_models import qwen25_vl, samples, true_ids
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchao.quantization import quantize_

from torchao_masquant import calibrate, evaluate, masquant_config

SAMPLE = samples(audio=False, count=1)[0]


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [DataParallel, DistributedDataParallel])
def test_a_wrapped_model_is_calibrated_quantized_and_called(
    kind, vl_recipe, process_group
):
    """By its own names, and for its own modalities; the tower is no decoder's."""
    wrapped = kind(qwen25_vl())
    data = samples(audio=False)
    recipe = calibrate(
        wrapped, data, rounding="nearest", alpha=0.5, separation=1.0, progress=False
    )
    assert list(recipe.layers) == list(vl_recipe.layers)
    assert recipe.modalities == ("text", "vision")
    quantize_(wrapped, masquant_config(recipe))
    ids = true_ids(wrapped.module, SAMPLE)
    for model in (wrapped, wrapped.module):
        with torch.no_grad(), recorded(model) as calls:
            model(**SAMPLE)
        assert_routed(calls, ids, linears=14)
    labelled = {**SAMPLE, "labels": SAMPLE["input_ids"]}
    assert evaluate(wrapped, {"words": [labelled]}, progress=False) is not None
