# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows that hold a question and its answer in columns, as messages."""

import ast
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from torchao_masquant.data.columns import (
    ANSWERS,
    CAPTIONS,
    CHOICES,
    CONTEXTS,
    INPUTS,
    INSTRUCTIONS,
    QUESTIONS,
    TRANSCRIPTS,
    Columns,
)
from torchao_masquant.data.message_keys import role_of
from torchao_masquant.data.notices import Notices
from torchao_masquant.data.parts import ASSISTANT, AUDIO, IMAGE, VIDEO, short

__all__ = ["question_of"]

# What is asked about media where a row does not ask anything.
_DEFAULT_PROMPTS: Mapping[frozenset[str], str] = {
    frozenset((IMAGE,)): "Describe the image.",
    frozenset((VIDEO,)): "Describe the video.",
    frozenset((AUDIO,)): "Describe what you hear.",
}
_SEVERAL = "Describe what you see and hear."
_TRANSCRIBE = "Write down what is said."

# Keys of a dict that is one of several answers.
_SAID = ("answer", "raw", "text", "value", "content", "caption", "sentence")

# A caption answers no question of these: it was not asked for.
_NO_CAPTION_ANSWERS = ("question", "q", "problem")

_NO_CLASSES = tuple(name for name in ANSWERS if name != "label")

_CHOICES_IN_COLUMNS = ("{}", "choice_{}", "option_{}")


def question_of(
    columns: Columns, kinds: set[str], where: str, notices: Notices
) -> list[Any]:
    """Messages of a row without messages.

    Args:
        columns: of the row; what is read is marked as such.
        kinds: of the media that it has.
        where: file and line, for the messages.
        notices: are told what is asked in place of a question, and which of several
            answers is taken.

    Raises:
        ValueError: a column holds something else than a text; or words that are not
            read would be replaced by a question of ours.
    """
    choices = _choices(columns, where)
    question = _question(columns, where, choices)
    # The class of a text by itself is no answer to it.
    names = ANSWERS if kinds or question is not None else _NO_CLASSES
    answer = _answer(columns, names, where, notices, choices)
    if isinstance(answer, list) and role_of(answer[0]) != ASSISTANT:
        # The whole of a conversation, its question again included.
        return answer
    text = columns.find(("text",))
    if question is None and text is not None:
        # What points at a medium is asked about it; what is answered, too.
        points = any(f"<{kind}>" in str(columns.row[text]) for kind in kinds)
        if answer is not None or points:
            question = _text(columns.take(text), text, where)
    said = None
    if kinds and answer is None and columns.find(_NO_CAPTION_ANSWERS) is None:
        said, answer = _caption(columns, where, notices)
    if question is None and kinds:
        lost = columns.unread_words() if said is None else []
        if lost:
            raise ValueError(
                f"{where} has a medium, and words under "
                f"{', '.join(map(repr, lost))}, which is not read: name what is asked "
                "'prompt', and what is answered 'answer' (or 'caption'); or leave it out "
                "to have the medium described."
            )
        question = _default(kinds, said)
        notices.add(where, f"no question is there: {question!r} is asked in its place")
    if question is None:
        return []
    return [*_as_messages(question, "user"), *_as_messages(answer, ASSISTANT)]


def _as_messages(said: Any, role: str) -> list[Any]:
    if said is None:
        return []
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return list(said) if isinstance(said, list) else [said]


def _caption(
    columns: Columns, where: str, notices: Notices
) -> tuple[Optional[str], Optional[str]]:
    """The column of what is said of a medium, and what it says."""
    name = columns.find(CAPTIONS, unread=True)
    names = columns.numbered("caption") if name is None else [name]
    if not names:
        return None, None
    values = [columns.take(name) for name in names]
    named = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return names[0], _one_of(values, named, where, notices)


def _question(
    columns: Columns, where: str, choices: Optional[list[str]]
) -> Optional[Any]:
    """Messages; or the instruction, the context, the question and the choices."""
    asked = columns.find(QUESTIONS)
    if asked is not None and isinstance(columns.row[asked], (list, Mapping)):
        return columns.take(asked)
    # What an instruction is about follows it; by itself an input is what is asked.
    order = (CONTEXTS, INSTRUCTIONS, QUESTIONS, INPUTS)
    context, *found = [columns.find(names) for names in order]
    if not any(found):
        empty = columns.find((*QUESTIONS, *INSTRUCTIONS), keep_empty=True)
        if empty is not None:
            raise ValueError(f"{where}: its {empty} is empty.")
        return None
    texts = [_text(columns.take(n), n, where) for n in (context, *found) if n]
    if choices is not None:
        letters = zip(string.ascii_uppercase, choices)
        texts.append("\n".join(f"{letter}. {choice}" for letter, choice in letters))
    return "\n".join(texts)


def _default(kinds: set[str], said: Optional[str]) -> str:
    if kinds == {AUDIO} and said is not None and said.lower() in (*TRANSCRIPTS, "text"):
        return _TRANSCRIBE
    return _DEFAULT_PROMPTS.get(frozenset(kinds), _SEVERAL)


def _answer(
    columns: Columns,
    names: Sequence[str],
    where: str,
    notices: Notices,
    choices: Optional[list[str]],
) -> Any:
    """A text, or messages; None where there is none."""
    name = columns.find(names)
    if name is None:
        empty = columns.find(names, keep_empty=True)
        if empty is not None:
            raise ValueError(f"{where}: its {empty} is empty.")
        return None
    value = columns.row[name]
    if choices is None and name.lower() == "label" and isinstance(value, (int, float)):
        # The number of a class says nothing to a model.
        return None
    columns.take(name)
    if choices is not None:
        return _chosen(value, name, where, choices)
    if _is_message(value) or (isinstance(value, list) and all(map(_is_message, value))):
        return value
    return _one_of(value, name, where, notices)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _one_of(value: Any, name: str, where: str, notices: Notices) -> Optional[str]:
    """The most frequent one of what is said, of as frequent ones the first."""
    said = _texts(value, name, where)
    if not said:
        return None
    best, _ = Counter(said).most_common(1)[0]
    if len(set(said)) > 1:
        notices.add(
            where,
            f"of several texts under {name!r} the most frequent is read, or the first",
        )
    return best


def _texts(value: Any, name: str, where: str) -> list[str]:
    if isinstance(value, str):
        return [_text(value, name, where)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, Mapping):
        key = next((key for key in _SAID if value.get(key) is not None), None)
        if key is not None:
            return _texts(value[key], name, where)
    elif isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item, name, where)]
    raise ValueError(f"{where}: {name} is a text, got {short(value)}.")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is a text, got {short(value)}.")
    if not value.strip():
        raise ValueError(f"{where}: its {name} is empty.")
    return value


def _choices(columns: Columns, where: str) -> Optional[list[str]]:
    """What there is to choose from: a list, a text of one, or the columns A to F."""
    name = columns.find(CHOICES)
    if name is None:
        for form in _CHOICES_IN_COLUMNS:
            found = [columns.find((form.format(letter),)) for letter in "abcdef"]
            if columns.find(("answer",)) is not None and all(found[:2]):
                return [str(columns.take(name)) for name in found if name is not None]
        return None
    value = columns.take(name)
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"{where}: {name} is a list of texts, got {short(columns.row[name])}."
        )
    return [str(choice) for choice in value]


def _chosen(value: Any, name: str, where: str, choices: list[str]) -> str:
    """A letter and the choice, of the number, the letter or the text of one."""
    index: Optional[int] = None
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if isinstance(value, int) and not isinstance(value, bool):
        index = value
    elif isinstance(value, str):
        said = value.strip()
        letter = said.strip(" ().").upper()
        if said in choices:
            index = choices.index(said)
        elif len(letter) == 1 and letter in string.ascii_uppercase:
            index = string.ascii_uppercase.index(letter)
        elif said.isdecimal():
            index = int(said)
    if index is None or not 0 <= index < len(choices):
        raise ValueError(
            f"{where}: {name} is the number, from 0, the letter or the text of one of "
            f"{len(choices)} choices, got {short(value)}."
        )
    return f"{string.ascii_uppercase[index]}. {choices[index]}"
