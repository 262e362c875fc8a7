# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Messages in the forms that data sets write them in, and media at their places."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from torchao_masquant.data.columns import MEDIA_COLUMNS, Columns, kind_of_file
from torchao_masquant.data.media import located
from torchao_masquant.data.message_keys import (
    CONTENTS,
    PLACES,
    SETTINGS,
    SPEAKERS,
    TYPES,
    WEIGHTS,
    pair_of,
    role_of,
)
from torchao_masquant.data.notices import Notices
from torchao_masquant.data.parts import (
    ASSISTANT,
    AUDIO,
    IMAGE,
    MEDIA,
    TEXT,
    VIDEO,
    Message,
    Part,
    short,
)

__all__ = ["Turns", "media_in"]

# Where a medium stands in a text; the first form holds its path.
_PLACEHOLDER = re.compile(
    r"<(?P<tag>img|audio|video)>(?P<path>[^<>\n]+)</(?P=tag)>"
    r"|<(?P<kind>image|video|audio)(?:[ _-]?(?P<number>\d+))?>"
)
# What numbers follow: image_1, image_path_1.
_STEMS: Mapping[str, tuple[str, ...]] = {
    kind: (kind, *(name.rstrip("s") for name in names))
    for kind, names in MEDIA_COLUMNS.items()
}
_TAGS: Mapping[str, str] = {"img": IMAGE, "audio": AUDIO, "video": VIDEO}


def media_in(columns: Columns, kind: str) -> list[Any]:
    """Media of one kind that a row, or a message, has in columns of their own."""
    names = MEDIA_COLUMNS[kind]
    first = columns.find(names)
    chosen = columns.numbered(*_STEMS[kind]) if first is None else [first]
    media: list[Any] = []
    for name in chosen:
        found = columns.take(name)
        several = isinstance(found, (list, tuple)) and not _is_frames(found, kind)
        media.extend(found if several else [found])
    return [medium for medium in media if medium is not None]


def _is_frames(values: Any, kind: str) -> bool:
    """Whether a list is one video, of images, and not several."""
    return kind == VIDEO and all(
        kind_of_file(value) == IMAGE
        if isinstance(value, str)
        else hasattr(value, "size")
        for value in values
    )


class Turns:
    """Reads a row's messages, and puts its media where the texts point at them.

    Args:
        media: of each kind, in the order in which the texts point at them.
        where: file and line, for the messages.
        folder: that relative paths start from.
        notices: are told what is not read.
    """

    def __init__(
        self,
        media: Mapping[str, list[Any]],
        where: str,
        folder: Optional[Path],
        notices: Notices,
    ):
        self._all = media
        self._left = {kind: list(media[kind]) for kind in MEDIA}
        self._where, self._folder, self._notices = where, folder, notices

    def read(self, entries: Any, name: str = "messages") -> tuple[Message, ...]:
        """Messages of a list of them.

        Raises:
            ValueError: they are of another form; or media and placeholders do not match.
            FileNotFoundError: a medium is not there.
        """
        if not isinstance(entries, (list, tuple)) or not entries:
            raise ValueError(
                f"{self._where}: {name} is a list of at least one message."
            )
        if all(isinstance(entry, str) for entry in entries):
            speakers = itertools.cycle(("user", ASSISTANT))
            entries = [{"role": r, "content": e} for r, e in zip(speakers, entries)]
        messages = [message for entry in entries for message in self._messages(entry)]
        return self._with_rest(messages)

    def _with_rest(self, messages: list[Message]) -> tuple[Message, ...]:
        """Media that no text points at stand before the first question."""
        pointed = {part.kind for message in messages for part in message.parts}
        for kind, left in self._left.items():
            if not left:
                continue
            if kind in pointed:
                raise ValueError(
                    f"{self._where} has {len(left)} {kind}(s) that no message points "
                    f"at, beside others: write <{kind}> where each stands, or add a "
                    f'part {{"type": "{kind}"}}.'
                )
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        rest = tuple(
            self._part_of(kind, value)
            for kind, left in self._left.items()
            for value in left
        )
        if rest and first is None:
            raise ValueError(
                f"{self._where} has media, and no message of the role 'user' that they "
                "could stand in."
            )
        if rest and first is not None:
            asked = messages[first]
            messages[first] = Message(asked.role, (*rest, *asked.parts), asked.scored)
        return tuple(messages)

    def _messages(self, entry: Any) -> Iterator[Message]:
        columns = Columns(entry) if isinstance(entry, Mapping) else None
        pair = None if columns is None else pair_of(columns)
        if columns is None or pair is None:
            yield self._message(entry, columns)
            return
        for role, name in zip(("user", ASSISTANT), pair):
            message = {"role": role, "content": columns.take(name)}
            yield self._message(message, Columns(message))
        self._name_unread(columns)

    def _message(self, entry: Any, columns: Optional[Columns]) -> Message:
        role = role_of(entry)
        if columns is None or role is None:
            raise ValueError(
                f"{self._where}: a message is a dict with 'role' and 'content', or with "
                f"'from' and 'value', got {short(entry)}."
            )
        columns.get(SPEAKERS)
        content = columns.get(CONTENTS, keep_empty=True)
        if isinstance(content, str):
            content = [{"type": TEXT, "text": content}]
        elif isinstance(content, Mapping):
            content = [content]
        if not isinstance(content, list) or not content:
            calls = "; tool calls are not read" if entry.get("tool_calls") else ""
            raise ValueError(
                f"{self._where}: the content of a message is a text or a list of parts, "
                f"got {short(content)}{calls}."
            )
        own = {kind: media_in(columns, kind) for kind in MEDIA}
        for kind, values in own.items():
            self._left[kind] = values + self._left[kind]
        before = {kind: len(left) for kind, left in self._left.items()}
        parts = [part for item in content for part in self._parts(item)]
        # A message's own media stand before its text, unless the text points at them.
        for kind, values in own.items():
            pointed_at = before[kind] - len(self._left[kind])
            parts[:0] = [self._next(kind) for _ in values[pointed_at:]]
        weights = [columns.take(n) for n in WEIGHTS if entry.get(n) is not None]
        self._name_unread(columns)
        return Message(role, tuple(parts), all(weights))

    def _name_unread(self, columns: Columns) -> None:
        for name in columns.unread():
            self._notices.unread(self._where, f"{name!r} of a message")

    def _parts(self, entry: Any) -> Iterator[Part]:
        if not isinstance(entry, Mapping):
            raise ValueError(
                f'{self._where}: a part of a message is a dict such as {{"type": '
                f'"text", "text": "..."}}, got {short(entry)}.'
            )
        entry = {key: value for key, value in entry.items() if value is not None}
        written = entry.get("type") or next((k for k in TYPES if k in entry), None)
        kind = TYPES.get(written) if isinstance(written, str) else None
        if kind is None:
            raise ValueError(
                f"{self._where}: unknown content type {written!r}: choose one of "
                f"{', '.join(map(repr, TYPES))}."
            )
        if kind == TEXT:
            text = entry.get("text")
            if not isinstance(text, str):
                raise ValueError(f"{self._where}: a part of type 'text' has a 'text'.")
            yield from self._split(text)
            used = "text"
        else:
            # A `datasets` dataset gives each part the keys of all.
            names = [n for n, k in TYPES.items() if k == kind]
            used = next((n for n in (*names, *PLACES) if n in entry), "")
            yield (
                self._part_of(kind, entry[used])
                if used
                else self._next(kind, entry.get("index"))
            )
        for key, value in entry.items():
            if key not in (*SETTINGS, used) and (
                value or not hasattr(value, "__len__")
            ):
                self._notices.unread(
                    self._where, f"{key!r} of a part of type {written!r}"
                )

    def _split(self, text: str) -> Iterator[Part]:
        """A text, and the media that it points at, in order."""
        matches = list(_PLACEHOLDER.finditer(text))
        if not matches:
            yield Part(TEXT, text)
            return
        position, is_first = 0, True
        for match in (*matches, None):
            end = len(text) if match is None else match.start()
            # The model's own template parts a medium from the words around it.
            words = text[position:end].strip("\r\n")
            words = words.lstrip() if is_first else words
            words = words.rstrip() if match is None else words
            if words:
                is_first = False
                yield Part(TEXT, words)
            if match is None:
                return
            if match["path"] is not None:
                yield self._part_of(_TAGS[match["tag"]], match["path"].strip())
            else:
                yield self._next(match["kind"], match["number"], text=True)
            position = match.end()

    def _next(self, kind: str, index: Any = None, text: bool = False) -> Part:
        """The next medium of a kind; or the one with an index, from 1 in a text."""
        if index is not None:
            position = int(index) - int(text)
            if not 0 <= position < len(self._all[kind]):
                raise ValueError(
                    f"{self._where} points at {kind} {index}, and has "
                    f"{len(self._all[kind])} of them in columns."
                )
            value = self._all[kind][position]
            self._left[kind] = [v for v in self._left[kind] if v is not value]
            return self._part_of(kind, value)
        if self._left[kind]:
            return self._part_of(kind, self._left[kind].pop(0))
        count = len(self._all[kind])
        if text:
            raise ValueError(
                f"{self._where}: its text says <{kind}> where no {kind} is left: it has "
                f"{count} in columns such as {kind!r}; give one for "
                "each."
            )
        raise ValueError(
            f"{self._where}: a part of type {kind!r} has no source: give it a 'path' or "
            f"a 'url', or the line a list '{kind}s'"
            + (f" of more than {count}." if count else ".")
        )

    def _part_of(self, kind: str, value: Any) -> Part:
        return Part(kind, located(value, kind, self._where, self._folder))
