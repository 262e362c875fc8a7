# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From a row of data to a conversation, in the forms that data sets have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from torchao_masquant.data.columns import (
    CAPTIONS,
    FILES,
    MEDIA_COLUMNS,
    TURNS,
    Columns,
    kind_of_file,
)
from torchao_masquant.data.notices import Notices
from torchao_masquant.data.parts import MEDIA, Conversation, short
from torchao_masquant.data.questions import question_of
from torchao_masquant.data.turns import Turns, media_in

__all__ = ["conversation_of"]


def conversation_of(
    row: Any,
    where: str,
    folder: Optional[Path] = None,
    notices: Optional[Notices] = None,
) -> Conversation:
    """Check a line of a file, or a row of a dataset, and read it.

    Args:
        row: a list of messages; or a dict with ``messages`` or ``conversations``; or with
            a question and an answer; or with media and what is said of them; or of
            ``text`` alone, which is plain text. The names of the columns are those of
            :mod:`torchao_masquant.data.columns`. Media are in columns or in parts of
            messages; ``<image>``, ``<video>`` and ``<audio>`` in a text say where those of
            the columns stand, or else they stand before the first question. ``task`` may
            name the task.
        where: for the messages.
        folder: that relative paths start from; None for the current one.
        notices: are told what is not read, and what is put in place of what is not
            there; None to log that at once.

    Raises:
        ValueError: it is of another form; a text points at media that are not there, or
            the other way round; or a row with media has texts, and none that is read.
        FileNotFoundError: a medium is not there.
        OSError: an address does not answer.
    """
    told = Notices() if notices is None else notices
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, not a dict with 'messages', or with "
            "'image', 'audio', 'prompt' or 'text'."
        )
    columns = Columns(row)
    task = columns.get(("task",))
    if task is not None and not isinstance(task, str):
        raise ValueError(f"{where}: task is a name, got {short(task)}.")
    conversation = _read(columns, where, folder, told, task)
    if not conversation.kinds & set(MEDIA):
        _refuse_lost_media(columns, where)
    for name in columns.unread():
        told.unread(where, repr(name))
    if notices is None:
        told.say()
    return conversation


def _read(
    columns: Columns,
    where: str,
    folder: Optional[Path],
    notices: Notices,
    task: Optional[str],
) -> Conversation:
    media = _media(columns)
    kinds = {kind for kind, values in media.items() if values}
    before = _before(columns, where)
    name = _turns_name(columns)
    if name is not None:
        entries = _parsed(columns.take(name), name, where)
    else:
        entries = question_of(columns, kinds, where, notices)
        if not entries:
            return Conversation(where, text=_plain(columns, where), task=task)
    turns = Turns(media, where, folder, notices)
    if before and isinstance(entries, list):
        entries = [*before, *entries]
    return Conversation(where, turns.read(entries, name or "messages"), task=task)


def _media(columns: Columns) -> dict[str, list[Any]]:
    media = {kind: media_in(columns, kind) for kind in MEDIA}
    if not any(media.values()):
        name = columns.find(FILES)
        value = None if name is None else columns.row[name]
        kind = kind_of_file(value) if isinstance(value, str) else None
        if name is not None and kind is not None:
            media[kind].append(columns.take(name))
    return media


def _turns_name(columns: Columns) -> Optional[str]:
    """The column of messages; an empty one is told from none."""
    written = next((n for n in TURNS if columns.row.get(n) is not None), None)
    return columns.find(TURNS) or written


def _parsed(value: Any, name: str, where: str) -> Any:
    """Messages, also where a table holds them as a text of JSON, or by their keys."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"{where}: {name} is a list of messages, got the text {short(value)}."
            ) from error
    if isinstance(value, Mapping) and value:
        if all(isinstance(part, list) for part in value.values()):
            return [dict(zip(value, parts)) for parts in zip(*value.values())]
    return value


def _before(columns: Columns, where: str) -> list[Any]:
    """Messages before the first: what the model is told, and what was said already."""
    before: list[Any] = []
    system = columns.get(("system", "system_prompt"))
    if system is not None:
        if not isinstance(system, str):
            raise ValueError(f"{where}: system is a text, got {short(system)}.")
        before.append({"role": "system", "content": system})
    history = columns.get(("history",))
    if history is not None:
        if not isinstance(history, list) or not all(
            isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history
        ):
            raise ValueError(
                f"{where}: history is a list of pairs of a question and its answer, got "
                f"{short(history)}."
            )
        before += [{"user": asked, "assistant": said} for asked, said in history]
    return before


def _plain(columns: Columns, where: str) -> str:
    """The text of a row of text alone."""
    text = columns.get(("text",), keep_empty=True)
    if isinstance(text, str) and text.strip():
        return text
    if text is not None:
        said = "its text is empty" if isinstance(text, str) else "text is a text"
        raise ValueError(f"{where}: {said}, got {short(text)}.")
    caption = columns.find(CAPTIONS)
    if caption is not None:
        raise ValueError(
            f"{where} has {caption!r}, and no image or sound that it is about: give one "
            "under 'image' or 'audio', or the words under 'text'."
        )
    raise ValueError(
        f"{where} has none of 'messages', 'image', 'audio', 'prompt' and 'text', nor of "
        "the other names that are read: its keys are "
        f"{', '.join(map(repr, columns.row)) or 'none'}."
    )


def _refuse_lost_media(columns: Columns, where: str) -> None:
    known = (name for names in MEDIA_COLUMNS.values() for name in names)
    lost = [] if columns.has_name(known) else columns.unread_media()
    if lost:
        raise ValueError(
            f"{where} has media under {', '.join(map(repr, lost))}, which is not read: "
            "name the column 'image', 'video' or 'audio', and give files in it."
        )
