# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The columns of a row of data, by the names that data sets give them.

The names are looked for in any case. Of the names for one thing the first one is read;
what a row says elsewhere is told, see :meth:`Columns.unread`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Optional

import numpy as np

from torchao_masquant.data import images, sounds, videos
from torchao_masquant.data.parts import AUDIO, IMAGE, VIDEO

__all__ = [
    "ANSWERS",
    "CAPTIONS",
    "CHOICES",
    "CONTEXTS",
    "FILES",
    "INPUTS",
    "INSTRUCTIONS",
    "MEDIA_COLUMNS",
    "QUESTIONS",
    "TRANSCRIPTS",
    "TURNS",
    "Columns",
    "kind_of_file",
]

#: Media. Whoever lists several of a kind uses the plural, or numbers: image_1, image_2.
MEDIA_COLUMNS: Mapping[str, tuple[str, ...]] = {
    IMAGE: (
        *(
            "decoded_image",
            "images",
            "image",
            "img",
            "imgs",
            "image_path",
            "image_paths",
            "image_file",
        ),
        *("image_url", "image_urls", "picture", "photo", "jpg", "jpeg", "png"),
        *("image_base64", "image_base64_str"),
    ),
    VIDEO: ("videos", "video", "video_path", "video_file", "video_url", "mp4"),
    AUDIO: (
        *("audios", "audio", "audio_path", "audio_paths", "audio_file"),
        *("audio_filepath", "audio_url", "sound", "speech", "wav", "flac", "mp3"),
    ),
}

#: A file whose extension tells its kind, read where no column above is there.
FILES = ("file_name", "filename", "file", "file_path", "filepath", "path", "url")

#: Lists of messages.
TURNS = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "texts"),
    "qa_pairs",
)

#: What is asked; an instruction stands before the question that it is about.
INSTRUCTIONS = ("instruction",)
QUESTIONS = (
    *("prompt", "question", "query", "problem", "q", "user", "human", "text_input"),
)
INPUTS = ("input", "inputs")
CONTEXTS = ("context", "passage", "hint")
CHOICES = ("choices", "options", "candidates")

#: What is answered.
ANSWERS = (
    *("answer", "multiple_choice_answer", "answers", "response", "output", "outputs"),
    *("completion", "chosen", "target", "targets", "a", "answerkey"),
    *("correct_choice_idx", "assistant", "text_output", "solution", "ground_truth"),
    "label",
)

#: What is said of an image, a sound or a video; numbered ones are several.
TRANSCRIPTS = ("transcription", "transcript", "sentence", "normalized_text")
CAPTIONS = ("caption", "captions", "description", "sentences", *TRANSCRIPTS, "text")

# Names, numbers and addresses of a row, which are no part of what it says.
_IDENTIFIER = re.compile(r"(.*_)?(id|ids|idx|index|uid|uuid|md5|sha\d*|hash)$")
_ORIGIN = frozenset(
    (
        *("source", "dataset", "dataset_name", "subset", "split", "license", "lang"),
        *("language", "model", "date", "author", "format", "mode", "type", "speaker"),
        *("coco_url", "flickr_url", "duration", "subreddit", "timestamp"),
        *FILES,
    )
)
_MEDIUM_IDS = ("image_id", "video_id", "audio_id")
_MEDIUM_NAME = re.compile(
    r"(^|_)(image|img|picture|photo|video|audio|sound)s?(_(name|path|file|url|bytes))?$"
)


def kind_of_file(name: str) -> Optional[str]:
    """Of the medium in a file, by its extension; None where that tells none."""
    suffix = PurePath(name.split("?")[0]).suffix.lower()
    for kind, module in ((IMAGE, images), (AUDIO, sounds), (VIDEO, videos)):
        if suffix in module.EXTENSIONS:
            return kind
    return None


class Columns:
    """A row, and which of its columns have been read.

    Args:
        row: names to values; None and empty lists count as not there, as does an empty
            text that :meth:`get` is not told to keep.
    """

    def __init__(self, row: Mapping[str, Any]):
        self.row = row
        # The first of two that differ in case alone.
        self._names = {_plain(name): name for name in reversed(list(row))}
        self._read: set[str] = set()

    def find(
        self, names: Iterable[str], keep_empty: bool = False, unread: bool = False
    ) -> Optional[str]:
        """The first of these names that the row has something under, as it writes it.

        With ``unread``, something that was not read yet.
        """
        for name in names:
            written = self._names.get(name)
            if written is None or (unread and written in self._read):
                continue
            if not _is_nothing(self.row[written], keep_empty):
                return written
        return None

    def get(self, names: Iterable[str], keep_empty: bool = False) -> Any:
        """What is under the first of these names, which counts as read; or None."""
        name = self.find(names, keep_empty)
        return None if name is None else self.take(name)

    def take(self, name: str) -> Any:
        """What is in one column, which counts as read."""
        self._read.add(name)
        return self.row[name]

    def numbered(self, *stems: str) -> list[str]:
        """The columns ``stem_1``, ``stem_2``, ... that hold something, in order.

        Of several stems those of the first that the row has any of.
        """
        counted = [name for name in self._names if name[-1:].isdigit()]
        for stem in stems if counted else ():
            pattern = re.compile(rf"{stem}_?(\d+)$")
            found = [(int(m[1]), n) for n in counted if (m := pattern.match(n))]
            names = [self._names[name] for _, name in sorted(found)]
            held = [name for name in names if not _is_nothing(self.row[name])]
            if held:
                return held
        return []

    def has_name(self, names: Iterable[str]) -> bool:
        """Whether the row has one of these columns, be there something in it or not."""
        return any(name in self._names for name in names)

    def unread(self) -> list[str]:
        """Columns with text or media in them that were not read, but for identifiers."""
        return [
            name
            for name, value in self._left()
            if not _IDENTIFIER.match(_plain(name)) and _says_something(value)
        ]

    def unread_words(self) -> list[str]:
        """Those of them that do not merely say where the row comes from."""
        return [name for name in self.unread() if _plain(name) not in _ORIGIN]

    def unread_media(self) -> list[str]:
        """Columns that were not read and whose names or contents are those of media."""
        return [
            name
            for name, value in self._left()
            if _is_medium(value)
            or (_plain(name) in _MEDIUM_IDS and not _is_nothing(value))
            or (
                _MEDIUM_NAME.search(_plain(name))
                and not isinstance(value, (int, float))
                and _says_something(value)
            )
        ]

    def _left(self) -> list[tuple[str, Any]]:
        return [item for item in self.row.items() if item[0] not in self._read]


def _plain(name: str) -> str:
    return str(name).strip().lower()


def _is_nothing(value: Any, keep_empty: bool = False) -> bool:
    if isinstance(value, str):
        return not keep_empty and not value.strip()
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def _is_medium(value: Any) -> bool:
    """Whether a value is an image or a sound itself, or the address of a file of one."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_medium, value))
    if isinstance(value, Mapping):
        return "array" in value or value.get("bytes") is not None
    if isinstance(value, str):
        return bool(re.match(r"data:(image|audio|video)/", value)) or bool(
            len(value) < 1000 and not re.search(r"\s", value) and kind_of_file(value)
        )
    return (
        isinstance(value, (bytes, np.ndarray))
        # An image of Pillow, a tensor, a decoder of torchcodec.
        or hasattr(value, "getexif")
        or hasattr(value, "get_all_samples")
        or (hasattr(value, "shape") and not isinstance(value, np.generic))
    )


def _says_something(value: Any) -> bool:
    """Whether there are words or media in a value."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(map(_says_something, value))
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    return _is_medium(value)
