# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What data sets call the speakers, the contents and the parts of messages."""

from collections.abc import Mapping
from typing import Any, Optional

from torchao_masquant.data.columns import Columns
from torchao_masquant.data.parts import ASSISTANT, AUDIO, IMAGE, TEXT, VIDEO

__all__ = [
    "CONTENTS",
    "PLACES",
    "SETTINGS",
    "SPEAKERS",
    "TYPES",
    "WEIGHTS",
    "pair_of",
    "role_of",
]

_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("chatgpt", "bing", "bard", "function_call"), ASSISTANT),
    "system": "system",
    "observation": "tool",
}

# A message that is a question with its answer, in one dict.
_PAIRS = (
    *(("user", "assistant"), ("human", "gpt"), ("human", "assistant")),
    *(("question", "answer"), ("q", "a"), ("prompt", "response")),
    *(("query", "response"), ("instruction", "output")),
)

SPEAKERS = ("role", "from")
CONTENTS = ("content", "value", "text")
# Of an assistant's turn, whether it is scored.
WEIGHTS = ("weight", "loss", "train")

# Types of parts as OpenAI, transformers and vLLM write them.
TYPES: Mapping[str, str] = {
    **dict.fromkeys(("text", "input_text", "output_text"), TEXT),
    **dict.fromkeys(("image", "image_url", "input_image"), IMAGE),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), AUDIO),
    **dict.fromkeys(("video", "video_url", "input_video"), VIDEO),
}
# Where a medium is, beside the keys of its type.
PLACES = ("path", "url", "base64", "source")
# Of a part, what does not change what the model sees.
SETTINGS = ("type", "index", "detail", "format", "cache_control", "annotations")


def role_of(entry: Any) -> Optional[str]:
    """Who speaks in a message, in the names of chat templates; None where none does."""
    role = Columns(entry).get(SPEAKERS) if isinstance(entry, Mapping) else None
    if not isinstance(role, str):
        return None
    return _ROLES.get(role.strip("<|>").lower(), role)


def pair_of(columns: Columns) -> Optional[tuple[str, str]]:
    """The keys of a question and its answer, of a dict that is both and no message."""
    if columns.find(SPEAKERS) is not None:
        return None
    for question, answer in _PAIRS:
        found = columns.find((question,)), columns.find((answer,), keep_empty=True)
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None
