# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""An output head in 8 bits, of a vocabulary that vLLM fills up, in one process and two."""

from unittest import mock

import pytest
from subject import Subject

from torchao_masquant.testing import model_folders

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

#: No multiple of 64, which vLLM makes of it.
_VOCABULARY = 300


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "of its own"])
def subject(request, tmp_path_factory):
    text = {"tie_word_embeddings": request.param, "vocab_size": _VOCABULARY}
    with mock.patch.dict(model_folders._TEXT, text):
        folder = tmp_path_factory.mktemp("served")
        return Subject(
            folder, "w4a8", with_images=False, head_bits=8, rank=0, hadamard_size=32
        )


def test_one_process(subject, tmp_path):
    assert subject.reader.lm_head.weight.weight_bits == 8
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    assert subject.differences(answers) == []
    # Few ints are rounded the other way, and no row is another token's.
    apart = sorted(subject.log_probability_differences(answers))
    assert apart[-1] < 0.1 and apart[len(apart) * 9 // 10] < 1e-3


def test_two_processes(subject, tmp_path):
    answers = subject.asked_of_two_processes(tmp_path / "answers.json")
    assert all(d < 0.05 for d in subject.differences(answers))
    assert len(subject.differences(answers)) <= 2
