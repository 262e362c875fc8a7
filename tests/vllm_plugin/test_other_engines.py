# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What others read in an exported folder: vLLM without the plugin, and transformers."""

import statistics

import pytest
import torch
from requests_of_each_kind import requests
from subject import Subject

from torchao_masquant.deploy import export_compressed_tensors

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def exported(folder, scheme, *, with_images):
    """A model of ours, and the folder that is exported of it."""
    groups = {"group_size": 32} if scheme == "w4a16" else {}
    subject = Subject(
        folder, scheme, with_images=with_images, target="compressed-tensors", **groups
    )
    return subject, export_compressed_tensors(subject.folder, folder / "stock")


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize(
    "scheme, dtype, most",
    # An int8 that is rounded the other way moves a log probability by a hundredth. Of
    # 4-bit weights vLLM has no kernel in float32 on CPUs.
    [("w8a8", "float32", 0.05), ("w4a16", "bfloat16", 0.1)],
)
def test_vllm_without_the_plugin(tmp_path, scheme, dtype, most, with_images):
    """Log probabilities of the tokens that vLLM answers, against those of our model."""
    subject, stock = exported(tmp_path, scheme, with_images=with_images)
    dense = subject.loader.from_pretrained(subject.dense, dtype=torch.float32)
    answers = subject.asked(
        tmp_path / "answers.json",
        # No plugin at all.
        {"VLLM_PLUGINS": ""},
        folder=stock,
        enforce_eager=True,
        dtype=dtype,
    )
    for answer in answers:
        assert answer["prompt"] == subject.expected[answer["request"]][0]
    found = subject.log_probability_differences(answers)
    assert max(found) < most
    # It would show if it were another model.
    off = subject.log_probability_differences(answers, dense)
    assert statistics.mean(found) < statistics.mean(off) / 2


@torch.no_grad()
def test_transformers(tmp_path):
    subject, stock = exported(tmp_path, "w4a16", with_images=True)
    theirs = subject.loader.from_pretrained(stock, dtype=torch.float32).eval()
    for request in requests(4, with_images=True):
        inputs = subject.inputs(request)
        ours = subject.reader(**inputs).logits
        torch.testing.assert_close(theirs(**inputs).logits, ours, rtol=0, atol=1e-4)
