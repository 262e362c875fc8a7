# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One folder in vLLM, in a process of its own: FOLDER THREADS ADDRESS.

Answers calls (tokens of text, of an image, to generate) with (seconds, CPU seconds).
"""

import os
import sys
import time
from multiprocessing.connection import Client
from typing import Any

import numpy as np


def main() -> None:
    folder, threads, address = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{int(threads) - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from PIL import Image
    from vllm import LLM, SamplingParams

    from torchao_masquant.testing.model_folders import IMAGE

    model = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=1024,
        # As `vllm bench latency` has it.
        enable_prefix_caching=False,
        # Else an image's preprocessing is timed once, and then never.
        mm_processor_cache_gb=0,
    )
    draw = np.random.default_rng(0)
    with Client(address) as parent:
        parent.send("ready")
        while (call := parent.recv()) is not None:
            text, image, generated = call
            ids = draw.integers(10, 300, text).tolist()
            prompt: dict[str, Any] = {"prompt_token_ids": ids}
            if image:
                noise = draw.integers(0, 255, (224, 224, 3), np.uint8)
                prompt["prompt_token_ids"] = [ids[0], IMAGE, *ids[1:]]
                prompt["multi_modal_data"] = {"image": Image.fromarray(noise)}
            sampling = SamplingParams(
                temperature=0, max_tokens=generated, ignore_eos=True
            )
            start, busy = time.perf_counter(), time.process_time()
            (answer,) = model.generate([prompt], sampling, use_tqdm=False)
            took = time.perf_counter() - start, time.process_time() - busy
            parent.send((took, len(answer.prompt_token_ids)))


if __name__ == "__main__":
    main()
