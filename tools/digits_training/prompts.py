# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The prompts of the four tasks: those of one have the same length, and need no padding."""

from torchao_masquant.testing.digits.vocabulary import DIGIT_WORDS, TOKEN_ID

# Tokens an image or a clip occupies in the language model.
IMAGE_TOKENS = 16
AUDIO_TOKENS = 16

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
