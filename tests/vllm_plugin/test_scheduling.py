# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tokens are what they are however vLLM schedules their requests.

That it would show if images were taken for text is in ``test_served.py``.
"""

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    "settings, counter",
    [
        # A request that finds no place begins again later, with what it has written.
        (
            {
                "num_gpu_blocks_override": 10,
                "max_model_len": 256,
                "sampling": {"max_tokens": 40},
            },
            "vllm:num_preemptions",
        ),
        # Steps have more rows than tokens come of them.
        (
            {
                "speculative_config": {**_DRAFTS, "prompt_lookup_min": 1},
                "sampling": {"max_tokens": 40},
            },
            "vllm:spec_decode_num_accepted_tokens",
        ),
        # Answers share a prompt's blocks, and go on at random.
        (
            {"seed": 1, "sampling": {"n": 3, "temperature": 1}},
            "vllm:prefix_cache_hits",
        ),
    ],
    ids=["preempted", "speculative", "several answers"],
)
def test_a_request_that_is(seeing, tmp_path, settings, counter):
    answers = seeing.asked(tmp_path / "answers.json", enforce_eager=True, **settings)
    assert seeing.counters[counter] > 0
    # An int8 that is rounded the other way moves a log probability by a hundredth.
    assert max(seeing.log_probability_differences(answers)) < 0.05
