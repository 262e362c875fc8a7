# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tokens of videos, and of sounds between them, are what they are in vLLM."""

import json

import pytest
import qwen_folders
from subject import Subject
from vllm_process import told

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

_MODELS = {
    "Qwen2.5-VL": (
        {"make": qwen_folders.qwen25_vl, "image": qwen_folders.SIGHT},
        "<|video_pad|>",
        # Of steps this short, many end within a video.
        {"max_num_batched_tokens": 24, "limit_mm_per_prompt": {"video": 2}},
    ),
    # Half of its requests say that videos have sounds in them. vLLM mixes up what it has made
    # of either where a step ends there, of the dense model, too.
    "Qwen2.5-Omni": (
        {
            "make": qwen_folders.omni,
            "image": qwen_folders.OMNI_SIGHT,
            "sound": qwen_folders.SOUND,
        },
        "<|VIDEO|>",
        {
            "max_num_batched_tokens": 2048,
            "limit_mm_per_prompt": {"video": 2, "audio": 2},
        },
    ),
}


@pytest.mark.parametrize("model", _MODELS)
def test_videos(model, tmp_path):
    options, token, settings = _MODELS[model]
    options = {"with_images": True, "hadamard_size": 32, **options}
    subject = Subject(tmp_path, "w4a8", **options)
    output = tmp_path / "differences.json"
    mark = f"<|vision_start|>{token}<|vision_end|>"
    asked = [mark, json.dumps(settings), output]
    found = told("watch_videos.py", subject.folder, *asked, output=output)
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert max(found["as they are"]) < 0.05
    # It would show if they were taken for text.
    assert min(found["all is text"]) > 0.05
