# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a sample of data is before a processor has seen it: a conversation of parts."""

import reprlib
from dataclasses import dataclass
from typing import Any, Optional

__all__ = [
    "ASSISTANT",
    "AUDIO",
    "IMAGE",
    "MEDIA",
    "TEXT",
    "VIDEO",
    "Conversation",
    "Message",
    "Part",
    "short",
]

TEXT, IMAGE, AUDIO, VIDEO = "text", "image", "audio", "video"

#: Kinds of parts that are no text.
MEDIA = (IMAGE, VIDEO, AUDIO)

#: The role whose words are scored.
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        kind: "text", "image", "audio" or "video".
        value: the text; or the path of a file; or the bytes of one; or the medium
            itself, a PIL image, or a dict of an ``array`` and its ``sampling_rate``; of
            a video also a tuple of images, its frames.
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Message:
    """
    Attributes:
        role: "user", "assistant", "system", or what else the chat template knows.
        parts: in order.
        scored: False for an assistant's turn that its data takes out of the loss.
    """

    role: str
    parts: tuple[Part, ...]
    scored: bool = True


@dataclass(frozen=True)
class Conversation:
    """
    Attributes:
        where: file and line, for errors.
        messages: empty where the sample is plain text.
        text: plain text, which no chat template is put around.
        task: that the sample belongs to, where it says so.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: Optional[str] = None
    task: Optional[str] = None

    @property
    def kinds(self) -> set[str]:
        """Kinds of its parts."""
        return {part.kind for message in self.messages for part in message.parts}

    @property
    def is_answered(self) -> bool:
        """Whether the assistant has the last word."""
        return bool(self.messages) and self.messages[-1].role == ASSISTANT

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, m in enumerate(self.messages) if m.role == ASSISTANT]

    @property
    def scored_turns(self) -> list[int]:
        """Indices of those of them that count."""
        return [turn for turn in self.turns if self.messages[turn].scored]


def short(value: Any) -> str:
    """The beginning of a value's representation: a row may hold megabytes."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    shortener.maxlevel = 3
    return shortener.repr(value)
