# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM answers for schemes of few bits, and in types of 16 bits."""

import pytest
import torch
from subject import COUNT, Subject

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["w4a6", "w4a4"])
def test_few_bits(tmp_path, scheme):
    subject = Subject(tmp_path, scheme, with_images=False, group_size=32)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    # A step of 6 or 4 bits is larger than one of 8.
    assert all(d < 0.05 for d in subject.differences(answers))
    assert len(subject.differences(answers)) <= 1


@pytest.mark.parametrize(
    "scheme, eager", [("fp8", True), ("nvfp4", True), ("w4a8-fp8", False)]
)
def test_floats(tmp_path, scheme, eager):
    """With images and pairs; on a CPU what they round to is emulated."""
    subject = Subject(tmp_path, scheme, with_images=True, rank=2, separation=1.0)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=eager)
    # A step of four bits is larger than one of eight.
    assert all(d < 0.05 for d in subject.differences(answers))
    assert len(subject.differences(answers)) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_half_precision(tmp_path, scheme, dtype):
    groups = {"group_size": 32} if scheme == "w4a16" else {}
    subject = Subject(tmp_path, scheme, with_images=False, dtype=dtype, **groups)
    answers = subject.asked(
        tmp_path / "answers.json",
        enforce_eager=True,
        dtype=str(dtype).removeprefix("torch."),
    )
    # All of either is rounded to 8 or 11 bits, and not in the same places.
    assert all(d < 0.2 for d in subject.differences(answers))
    assert len(subject.differences(answers)) < COUNT // 2
