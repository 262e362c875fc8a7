# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM answers for quantized mixtures of experts is what transformers answers."""

import expert_folders
import pytest
import torch
from subject import COUNT, Subject

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@torch.no_grad()
def distances(subject: Subject, answers, *, with_images: bool) -> list[float]:
    """How likely transformers and vLLM take the first token of transformers' answers to be,
    where vLLM names it: differences of log probabilities."""
    found = []
    for request, (_, tokens), answer in zip(
        subject.requests, subject.expected, answers
    ):
        first = answer["logprobs"][0].get(str(tokens[0]))
        if bool(request.seeds) == with_images and first is not None:
            logits = subject.reader(**subject.inputs(request)).logits[0, -1]
            found.append(abs(logits.log_softmax(-1)[tokens[0]].item() - first))
    return found


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return Subject(
        tmp_path_factory.mktemp("seeing"),
        "w4a8",
        with_images=True,
        image=expert_folders.SIGHT,
        make=expert_folders.qwen3_vl_moe,
        hadamard_size=32,
    )


@pytest.mark.parametrize(
    "make, scheme",
    [
        (expert_folders.qwen3_moe, "w8a8"),
        (expert_folders.qwen3_moe, "w4a16"),
        (expert_folders.mixtral, "w4a8"),
        (expert_folders.granite_moe, "w4a8"),
        (expert_folders.qwen3_moe, "nvfp4"),
    ],
)
def test_text(tmp_path, make, scheme):
    groups = {"group_size": 32} if scheme == "w4a16" else {}
    subject = Subject(tmp_path, scheme, with_images=False, make=make, **groups)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    assert subject.differences(answers) == []


def test_a_model_that_loads_experts_by_code_of_its_own(tmp_path):
    make = expert_folders.deepseek_v2
    subject = Subject(tmp_path, "w4a8", with_images=False, make=make)
    answers = subject.asked(
        tmp_path / "answers.json",
        # Attention as transformers has it; and vLLM 0.32's operator for positions turns
        # queries of three dimensions wrong on CPUs, those of a dense model as well.
        {"VLLM_MLA_DISABLE": "1"},
        enforce_eager=True,
        compilation_config={"custom_ops": ["-rotary_embedding"]},
    )
    assert all(d < 0.05 for d in subject.differences(answers))
    assert len(subject.differences(answers)) <= 1


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_images_in_steps_that_end_within_them(seeing, tmp_path, eager):
    answers = seeing.asked(tmp_path / "answers.json", enforce_eager=eager)
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert all(d < 0.05 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) <= 1
    assert max(distances(seeing, answers, with_images=False)) < 1e-3
    assert max(distances(seeing, answers, with_images=True)) < 5e-3


def test_it_would_show_if_images_were_taken_for_text(seeing, tmp_path):
    answers = seeing.asked(
        tmp_path / "answers.json", enforce_eager=True, all_is_text=True
    )
    assert max(distances(seeing, answers, with_images=False)) < 1e-3
    assert min(distances(seeing, answers, with_images=True)) > 1e-2


def test_two_processes(seeing, tmp_path):
    answers = seeing.asked_of_two_processes(tmp_path / "answers.json")
    # Each process rounds its own columns of an input, with a scale of their own.
    assert all(d < 0.3 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) < COUNT // 3
