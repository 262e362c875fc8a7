# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM answers as transformers does, whatever the model is and has for its modalities."""

import pytest
import qwen_folders
from subject import COUNT, Subject

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

_NO_VIDEO = {"limits": {"video": 0}}
_SUBJECTS = {
    "Qwen2-VL": (
        {"make": qwen_folders.qwen2_vl, "image": qwen_folders.SIGHT},
        _NO_VIDEO,
    ),
    "Qwen2.5-VL": (
        {"make": qwen_folders.qwen25_vl, "image": qwen_folders.SIGHT},
        _NO_VIDEO,
    ),
    "Qwen2-Audio": (
        {
            "make": qwen_folders.qwen2_audio,
            "with_images": False,
            "sound": qwen_folders.SOUND,
        },
        {},
    ),
    "Qwen2.5-Omni": (
        {
            "make": qwen_folders.omni,
            "image": qwen_folders.OMNI_SIGHT,
            "sound": qwen_folders.SOUND,
        },
        _NO_VIDEO,
    ),
    "Qwen2.5-Omni's thinker": (
        {
            "make": qwen_folders.omni_thinker,
            "image": qwen_folders.OMNI_SIGHT,
            "sound": qwen_folders.SOUND,
        },
        _NO_VIDEO,
    ),
}


@pytest.fixture(scope="module", params=_SUBJECTS)
def served(request, tmp_path_factory):
    options, settings = _SUBJECTS[request.param]
    folder = tmp_path_factory.mktemp("served")
    options = {"with_images": True, "hadamard_size": 32, **options}
    return Subject(folder, "w4a8", **options), settings


def test_images_and_sounds_in_steps_that_end_within_them(served, tmp_path):
    subject, settings = served
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True, **settings)
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert all(d < 0.05 for d in subject.differences(answers))
    assert len(subject.differences(answers)) <= 2


def test_it_would_show_if_all_were_taken_for_text(served, tmp_path):
    subject, settings = served
    answers = subject.asked(
        tmp_path / "answers.json", enforce_eager=True, all_is_text=True, **settings
    )
    assert len(subject.differences(answers)) > COUNT // 4


def test_text_of_a_llama(tmp_path):
    subject = Subject(tmp_path, "w8a8", with_images=False, make=qwen_folders.llama)
    answers = subject.asked(tmp_path / "answers.json", enforce_eager=True)
    assert subject.differences(answers) == []
