# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What vLLM answers for quantized mixtures of experts is what transformers answers."""

import expert_folders
import pytest
import torch
from test_served import _COUNT, Subject

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


class Mixture(Subject):
    """Keeps, too, how likely transformers takes the first token of an answer to be."""

    def _answer(self, request):
        prompt, tokens = super()._answer(request)
        with torch.no_grad():
            logits = self._reader(**self._inputs(request)).logits[0, -1]
        known = self.__dict__.setdefault("first", [])
        known.append(logits.log_softmax(-1)[tokens[0]].item())
        return prompt, tokens

    def distances(self, answers, *, with_images: bool) -> list[float]:
        """Of the first tokens' log probabilities, where vLLM names that of the token."""
        return [
            abs(first - answer["logprobs"][0][str(tokens[0])])
            for request, (_, tokens), first, answer in zip(
                self.requests, self.expected, self.first, answers
            )
            if bool(request.seeds) == with_images
            and str(tokens[0]) in answer["logprobs"][0]
        ]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return Mixture(
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
    ],
)
def test_text(tmp_path, make, scheme):
    groups = {"group_size": 32} if scheme == "w4a16" else {}
    subject = Subject(tmp_path, scheme, with_images=False, make=make, **groups)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    assert subject.differences(answers) == []


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_images_in_steps_that_end_within_them(seeing, tmp_path, eager):
    answers = seeing.asked(tmp_path / "answers.json", enforce_eager=eager)
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert all(d < 0.05 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) <= 1
    assert max(seeing.distances(answers, with_images=False)) < 1e-3
    assert max(seeing.distances(answers, with_images=True)) < 5e-3


def test_it_would_show_if_images_were_taken_for_text(seeing, tmp_path):
    answers = seeing.asked(
        tmp_path / "answers.json", enforce_eager=True, all_is_text=True
    )
    assert max(seeing.distances(answers, with_images=False)) < 1e-3
    assert min(seeing.distances(answers, with_images=True)) > 1e-2


def test_two_processes(seeing, tmp_path):
    answers = seeing.asked(
        tmp_path / "answers.json",
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
        enforce_eager=True,
        tensor_parallel_size=2,
    )
    # Each process rounds its own columns of an input, with a scale of their own.
    assert all(d < 0.3 for d in seeing.differences(answers))
    assert len(seeing.differences(answers)) < _COUNT // 3
