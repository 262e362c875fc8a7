# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A message in other words, which tells where a chat template puts it."""

from typing import Any

import torch

from torchao_masquant.data.parts import TEXT

__all__ = ["equal_tokens", "reworded"]


def reworded(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose texts begin and end with other characters."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": _other_words(content)}
    parts = [
        {**part, "text": _other_words(part["text"])} if part["type"] == TEXT else part
        for part in content
    ]
    return {**message, "content": parts}


def _other_words(text: str) -> str:
    # Of the same class, since a tokenizer joins letters to the space before them, but
    # not digits; and of one byte, so that no token of bytes is a part of both.
    words = ""
    for character in (text[:1], text[-1:]):
        pair = "45" if character.isdigit() else "QX" if character.isalnum() else "#~"
        words += pair[character == pair[0]]
    return words


def equal_tokens(first: torch.Tensor, second: torch.Tensor) -> int:
    """With how many equal tokens two sequences begin."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
