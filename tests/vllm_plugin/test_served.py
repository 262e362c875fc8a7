# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM answers for a quantized folder is what transformers answers."""

import pytest
from subject import COUNT, Subject

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_text(tmp_path, scheme):
    groups = {"group_size": 32} if scheme == "w4a16" else {}
    subject = Subject(tmp_path, scheme, with_images=False, **groups)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    assert subject.differences(answers) == []


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_images_in_steps_that_end_within_them(seeing, tmp_path, eager):
    answers = seeing.asked(tmp_path / "answers.json", enforce_eager=eager)
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert all(d < 0.05 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) <= 1


def test_it_would_show_if_images_were_taken_for_text(seeing, tmp_path):
    answers = seeing.asked(
        tmp_path / "answers.json", enforce_eager=True, all_is_text=True
    )
    assert len(seeing.differences(answers)) > COUNT // 4
    assert max(seeing.log_probability_differences(answers)) > 0.2


def test_two_processes(seeing, tmp_path):
    answers = seeing.asked_of_two_processes(tmp_path / "answers.json")
    # Each process rounds its own columns of an input, with a scale of their own.
    assert all(d < 0.3 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) < COUNT // 3


def test_two_stages(tmp_path):
    subject = Subject(tmp_path, "w8a8", with_images=False)
    # vLLM 0.32 has no buffer between stages that it does not compile: any model fails then.
    answers = subject.asked_of_two_processes(
        tmp_path / "answers.json", pipeline_parallel_size=2
    )
    assert subject.differences(answers) == []
