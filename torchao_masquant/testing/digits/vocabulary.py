# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The whole vocabulary of the digits model, and its four prompts.

There is no tokenizer: a prompt is a tuple of token names, and :data:`TOKEN_ID` maps a
name to its id. All prompts of a task have the same length, so that a batch of one task
never needs padding.
"""

TASKS: tuple[str, ...] = ("image", "audio", "both", "text")

# Tokens an image or a clip occupies in the language model, see features.py.
IMAGE_TOKENS = 16
AUDIO_TOKENS = 16

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

_IMAGE = ("<vision_start>", *("<image>",) * IMAGE_TOKENS, "<vision_end>")
_AUDIO = ("<audio_start>", *("<audio>",) * AUDIO_TOKENS, "<audio_end>")

_MULTIMODAL_PROMPTS: dict[str, tuple[str, ...]] = {
    "image": ("<bos>", *_IMAGE, "which", "digit", "is", "shown", "?"),
    "audio": ("<bos>", *_AUDIO, "which", "digit", "is", "spoken", "?"),
    "both": ("<bos>", *_IMAGE, *_AUDIO, "what", "is", "the", "sum", "?"),
}


def multimodal_prompt(task: str) -> list[int]:
    """Token ids of the prompt that all examples of ``task`` share (not "text")."""
    return [TOKEN_ID[token] for token in _MULTIMODAL_PROMPTS[task]]


def text_prompts() -> list[tuple[list[int], int]]:
    """Every (token ids, sum) of the "text" task.

    Two phrasings times two spellings ("7", "seven") of each of the two digits: 800
    prompts for 100 sums, so that prompts can be held out whose sum was trained on in
    another form only.
    """
    spellings = [(str(d), d) for d in range(10)]
    spellings += [(word, d) for d, word in enumerate(DIGIT_WORDS)]
    prompts = []
    for first, a in spellings:
        for second, b in spellings:
            for tokens in (
                ("<bos>", "what", "is", first, "plus", second, "?"),
                ("<bos>", "sum", "of", first, "and", second, "?"),
            ):
                prompts.append(([TOKEN_ID[token] for token in tokens], a + b))
    return prompts


def answer_id(number: int) -> int:
    """Token id of the answer ``number``, 0 to 18."""
    return TOKEN_ID[str(number)]
