# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The whole vocabulary of the digits model, and its four tasks.

There is no tokenizer: :data:`TOKEN_ID` maps the name of a token to its id.
"""

TASKS: tuple[str, ...] = ("image", "audio", "both", "text")

LARGEST_ANSWER = 18
DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)

VOCABULARY: tuple[str, ...] = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<vision_start>",
    "<vision_end>",
    "<image>",
    "<video>",
    "<audio_start>",
    "<audio_end>",
    "<audio>",
    *(str(number) for number in range(LARGEST_ANSWER + 1)),
    *DIGIT_WORDS,
    "which",
    "digit",
    "shown",
    "spoken",
    "what",
    "is",
    "the",
    "sum",
    "of",
    "and",
    "plus",
    "?",
)

TOKEN_ID: dict[str, int] = {token: index for index, token in enumerate(VOCABULARY)}
