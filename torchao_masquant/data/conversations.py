# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Conversations: what a sample of data is before a processor has seen it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

__all__ = [
    "AUDIO",
    "IMAGE",
    "TEXT",
    "Conversation",
    "Message",
    "Part",
    "conversation_of",
]

TEXT, IMAGE, AUDIO = "text", "image", "audio"

# Keys of a part, or of a row, that hold what it is made of. The first is ours.
_SOURCES: Mapping[str, tuple[str, ...]] = {
    TEXT: ("text",),
    IMAGE: ("image", "path", "url"),
    AUDIO: ("audio", "path", "url", "audio_url"),
}

# Columns of a row without messages, and of the media that messages only point at.
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    IMAGE: ("images", "image"),
    AUDIO: ("audios", "audio"),
}
_PROMPTS = ("prompt", "question", "text")
_ANSWER = "answer"

_DEFAULT_PROMPTS: Mapping[frozenset[str], str] = {
    frozenset((IMAGE,)): "Describe the image.",
    frozenset((AUDIO,)): "Describe what you hear.",
    frozenset((IMAGE, AUDIO)): "Describe what you see and hear.",
}


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        kind: "text", "image" or "audio".
        value: the text; or where the medium is, a path or an address; or the medium
            itself, a PIL image, or a dict of an ``array`` and its ``sampling_rate``.
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Message:
    """
    Attributes:
        role: "user", "assistant", "system", or what else the chat template knows.
        parts: in order.
    """

    role: str
    parts: tuple[Part, ...]


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
        return bool(self.messages) and self.messages[-1].role == "assistant"


def conversation_of(
    row: Any, where: str, folder: Optional[Path] = None
) -> Conversation:
    """Check a line of a JSONL file, or a row of a dataset, and read it.

    Args:
        row: a list of messages; or a dict with ``messages`` (an image or sound in them
            may leave its source to the columns ``images`` and ``audios``); or a dict
            of ``image``, ``audio``, ``prompt`` and ``answer``, or of ``text`` alone,
            which is plain text. ``task`` may name the task.
        where: for the messages.
        folder: that relative paths start from; None for the current one.

    Raises:
        ValueError: it is of another form.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, not a dict with 'messages', or with "
            "'image', 'audio', 'prompt' or 'text'."
        )
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise ValueError(f"{where}: task is a name, got {task!r}.")
    media = {kind: list(_media(row, kind)) for kind in _COLUMNS}
    if row.get("messages") is not None:
        messages = _messages(row["messages"], media, where, folder)
        left = next((kind for kind, values in media.items() if values), None)
        if left is not None:
            raise ValueError(
                f"{where} has {len(media[left])} {left}(s) that no message points at: "
                f'add a part {{"type": "{left}"}} for each.'
            )
        return Conversation(where, messages, task=task)
    return _simple(row, media, where, folder, task)


def _media(row: Mapping[str, Any], kind: str) -> Iterator[Any]:
    for column in _COLUMNS[kind]:
        found = row.get(column)
        if found is not None:
            yield from found if isinstance(found, list) else [found]


def _simple(
    row: Mapping[str, Any],
    media: Mapping[str, list[Any]],
    where: str,
    folder: Optional[Path],
    task: Optional[str],
) -> Conversation:
    """A row without messages: one question, and perhaps its answer."""
    named = [name for name in _PROMPTS if row.get(name) is not None]
    for name in (*named, *([_ANSWER] if row.get(_ANSWER) is not None else [])):
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} is a text, got {row[name]!r}.")
    parts = [
        Part(kind, _located(value, kind, where, folder))
        for kind, values in media.items()
        for value in values
    ]
    if not parts and named == ["text"] and row.get(_ANSWER) is None:
        return Conversation(where, text=_filled(row["text"], "text", where), task=task)
    if not parts and not named:
        raise ValueError(
            f"{where} has none of 'messages', 'image', 'audio', 'prompt' and 'text': "
            f"its keys are {', '.join(map(repr, row)) or 'none'}."
        )
    prompt = (
        _filled(row[named[0]], named[0], where)
        if named
        else _DEFAULT_PROMPTS[frozenset(part.kind for part in parts)]
    )
    messages = [Message("user", (*parts, Part(TEXT, prompt)))]
    if row.get(_ANSWER) is not None:
        answer = _filled(row[_ANSWER], _ANSWER, where)
        messages.append(Message("assistant", (Part(TEXT, answer),)))
    return Conversation(where, tuple(messages), task=task)


def _filled(text: str, name: str, where: str) -> str:
    if not text.strip():
        raise ValueError(f"{where}: its {name} is empty.")
    return text


def _messages(
    entries: Any,
    media: dict[str, list[Any]],
    where: str,
    folder: Optional[Path],
) -> tuple[Message, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: messages is a list of at least one message.")
    messages = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
            raise ValueError(
                f"{where}: a message is a dict with 'role' and 'content', got {entry!r}."
            )
        content = entry.get("content")
        if isinstance(content, str):
            content = [{"type": TEXT, "text": content}]
        if not isinstance(content, list) or not content:
            raise ValueError(
                f"{where}: the content of a message is a text or a list of parts, got "
                f"{content!r}."
            )
        parts = tuple(_part(part, media, where, folder) for part in content)
        messages.append(Message(entry["role"], parts))
    return tuple(messages)


def _part(
    entry: Any, media: dict[str, list[Any]], where: str, folder: Optional[Path]
) -> Part:
    if not isinstance(entry, Mapping):
        raise ValueError(
            f'{where}: a part of a message is a dict such as {{"type": "text", "text": '
            f'"..."}}, got {entry!r}.'
        )
    kind = entry.get("type")
    if kind == "video":
        raise ValueError(
            f"{where}: videos are not read: give some of their frames, as parts of "
            "type 'image'."
        )
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise ValueError(
            f"{where}: unknown content type {kind!r}: choose one of "
            f"{', '.join(map(repr, _SOURCES))}."
        )
    found = [entry[key] for key in _SOURCES[kind] if entry.get(key) is not None]
    if kind == TEXT:
        if not found or not isinstance(found[0], str):
            raise ValueError(f"{where}: a part of type 'text' has a 'text'.")
        return Part(TEXT, found[0])
    if not found:
        if not media[kind]:
            raise ValueError(
                f"{where}: a part of type {kind!r} has no source: give it a 'path' or "
                f"a 'url', or the line a list {_COLUMNS[kind][0]!r}."
            )
        found = [media[kind].pop(0)]
    return Part(kind, _located(found[0], kind, where, folder))


def _located(value: Any, kind: str, where: str, folder: Optional[Path]) -> Any:
    """A medium, or the path or the address of one, which is checked to be there."""
    if isinstance(value, Mapping) and "array" not in value:
        # As `datasets` holds a medium that it has not decoded.
        value = value.get("path") or value.get("bytes")
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if text.startswith(("http://", "https://")):
        return text
    path = Path(text.removeprefix("file://"))
    if not path.is_absolute() and folder is not None:
        path = folder / path
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no {kind} {str(path)!r}.")
    return path
