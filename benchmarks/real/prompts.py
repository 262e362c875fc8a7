# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The four tasks as token ids of SmolLM2, which needs no tokenizer to load.

Tokens that SmolLM2 keeps for source code, and that no task has, stand for images, sounds
and their ends.
"""

__all__ = ["ANSWERS", "MARKS", "TASKS", "TEXT", "prompt"]

#: What prose is called among the tasks.
TEXT = "text"

#: Name of each mark to its token, in SmolLM2 one of "<jupyter_start>" and its like.
MARKS = {
    "vision_start": 11,
    "vision_end": 12,
    "image": 13,
    "video": 14,
    "audio_start": 8,
    "audio_end": 9,
    "audio": 10,
}

#: Tokens of " zero" to " nine".
ANSWERS = (6708, 582, 827, 1296, 1876, 2531, 2976, 4962, 4475, 7462)

_IMAGE = [MARKS["vision_start"], *[MARKS["image"]] * 16, MARKS["vision_end"]]
_AUDIO = [MARKS["audio_start"], *[MARKS["audio"]] * 16, MARKS["audio_end"]]
_SHOWN = [378, 11403, 3057, 314]  # " The digit shown is"
_SPOKEN = [378, 11403, 9235, 314]  # " The digit spoken is"

_PROMPTS = {
    "image": _IMAGE + _SHOWN,
    "audio": _AUDIO + _SPOKEN,
    "both, shown": _IMAGE + _AUDIO + _SHOWN,
    "both, spoken": _IMAGE + _AUDIO + _SPOKEN,
}

TASKS = tuple(_PROMPTS)


def prompt(task: str) -> list[int]:
    """Token ids that all examples of a task share, up to but without the answer."""
    return _PROMPTS[task]
