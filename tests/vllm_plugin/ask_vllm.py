# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Ask vLLM for greedy tokens, in a process of its own: FOLDER COUNT OPTIONS OUTPUT."""

import json
import sys
from pathlib import Path

from requests_of_each_kind import requests


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, count, options, output = sys.argv[1:]
    settings = json.loads(options)
    with_images = settings.pop("with_images")
    image, sound = settings.pop("image"), settings.pop("sound")
    sampled = settings.pop("sampling", {})
    if settings.pop("all_is_text", False):
        from torchao_masquant.vllm_plugin.token_ids import TokenIds

        TokenIds.fill = lambda self, input_ids, is_multimodal: None  # type: ignore[method-assign]
    model = LLM(
        folder,
        dtype=settings.pop("dtype", "float32"),
        # Of steps this short, many end within an image.
        max_num_batched_tokens=24,
        # Small enough for prompts to have blocks in common.
        block_size=32,
        disable_log_stats=False,
        max_model_len=settings.pop("max_model_len", 512),
        limit_mm_per_prompt={
            **({"image": 2} if with_images else {}),
            **({"audio": 2} if sound is not None else {}),
            **settings.pop("limits", {}),
        },
        **settings,
    )
    asked = [
        {"prompt": r.prompt, "multi_modal_data": r.media}
        if r.media
        else {"prompt": r.prompt}
        for r in requests(int(count), with_images=with_images, image=image, sound=sound)
    ]
    # The log probability of any token, so that one that was not chosen has one, too.
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 20}
    sampling = SamplingParams(**{**options, **sampled})
    answers = [
        {
            "request": index,
            "prompt": list(answer.prompt_token_ids),
            "tokens": list(given.token_ids),
            "logprobs": [
                {str(t): p.logprob for t, p in step.items()} for step in given.logprobs
            ],
        }
        for index, answer in enumerate(model.generate(asked, sampling, use_tqdm=False))
        for given in answer.outputs
    ]
    counters = {m.name: m.value for m in model.get_metrics() if hasattr(m, "value")}
    Path(output).write_text(json.dumps({"answers": answers, "counters": counters}))


if __name__ == "__main__":
    main()
