# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The table of two hundred requests of docs/serving.md: [omni] [llava], each by itself."""

import sys
import tempfile
from pathlib import Path

import qwen_folders
import subject

_OMNI = {
    "make": qwen_folders.omni,
    "image": qwen_folders.OMNI_SIGHT,
    "sound": qwen_folders.SOUND,
}
#: Options of the folder, and of vLLM.
_MODELS = {"omni": (_OMNI, {"limits": {"video": 0}}), "llava": ({}, {})}
_PARALLEL = {"tensor_parallel_size": 2}
_WAYS = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},
    "two processes, eager": {"enforce_eager": True, **_PARALLEL},
    "two processes, compiled": {"enforce_eager": False, **_PARALLEL},
    "every token taken for text": {"enforce_eager": True, "all_is_text": True},
}


def main() -> None:
    subject.COUNT = 200
    for name in sys.argv[1:] or _MODELS:
        options, settings = _MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            of = subject.Subject(
                Path(folder), "w4a8", with_images=True, hadamard_size=32, **options
            )
            for way, asked in _WAYS.items():
                ask = (
                    of.asked_of_two_processes
                    if _PARALLEL.items() <= asked.items()
                    else of.asked
                )
                answers = ask(Path(folder) / "answers.json", **asked, **settings)
                others = of.differences(answers)
                alike = len(answers) - len(others)
                print(f"{name}, {way}: {alike} of {len(answers)}", end=" ")
                print(f"({max(others, default=0.0):.2g})", flush=True)


if __name__ == "__main__":
    main()
