# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where conversations come from: a file, a folder, a dataset, or nowhere."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from torchao_masquant.data import images, sounds, videos
from torchao_masquant.data.columns import kind_of_file
from torchao_masquant.data.conversations import conversation_of
from torchao_masquant.data.files import is_data_file, rows_of_file
from torchao_masquant.data.notices import Notices
from torchao_masquant.data.parts import AUDIO, IMAGE, VIDEO, Conversation, Part
from torchao_masquant.data.synthetic import synthetic_conversations
from torchao_masquant.data.tables import (
    is_saved_dataset,
    rows_of_dataset,
    rows_of_saved,
)

__all__ = ["SYNTHETIC", "read_conversations"]

_LOGGER = logging.getLogger(__name__)

#: name of the built-in samples, in place of a path
SYNTHETIC = "synthetic"

_TEXTS = (".txt",)
# What a folder of images or sounds that `datasets` loads says about them.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_conversations(
    source: Union[str, Path, Iterable[Any]],
    kinds: Sequence[str] = (IMAGE, AUDIO),
    max_samples: Optional[int] = None,
) -> list[Conversation]:
    """Read and check data, up to the headers of its images and sounds.

    What is not read, and what is put in place of what is not there, is logged once.

    Args:
        source: a file of JSON lines, of a JSON array, of CSV, or of parquet; a folder; a
            dataset that ``save_to_disk`` wrote; "synthetic"; or rows such as a `datasets`
            dataset gives; see :func:`conversation_of` for a row.
        kinds: of media that made-up samples are to have.
        max_samples: read the first so many; None for all.

    Raises:
        FileNotFoundError: the source, or a file that it names, is not there.
        ValueError: it is empty, or a line, an image or a sound is damaged.
        OSError: an address does not answer.
        ImportError: the library that reads it is missing.
    """
    if isinstance(source, (str, Path)) and str(source) == SYNTHETIC:
        return synthetic_conversations(kinds)[:max_samples]
    folder: Optional[Path] = None
    if isinstance(source, (str, Path)):
        path = Path(source)
        rows = _rows_of_path(path)
        folder = path if path.is_dir() and not is_saved_dataset(path) else path.parent
    else:
        rows = ((r, f"row {n}") for n, r in enumerate(rows_of_dataset(source)))
    notices = Notices()
    conversations = []
    for row, where in itertools.islice(rows, max_samples):
        conversation = conversation_of(row, where, folder, notices)
        for message in conversation.messages:
            for part in message.parts:
                _check_medium(part, where)
        conversations.append(conversation)
    if not conversations:
        name = repr(str(source)) if isinstance(source, (str, Path)) else "the data"
        raise ValueError(f"{name} is empty: give at least one sample.")
    notices.say()
    return conversations


def _rows_of_path(path: Path) -> Iterator[tuple[Any, str]]:
    if path.is_dir():
        if is_saved_dataset(path):
            return rows_of_saved(path)
        described = next((path / n for n in _METADATA if (path / n).is_file()), None)
        return _rows_of_folder(path) if described is None else rows_of_file(described)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no data {str(path)!r}: give a .jsonl file, a folder, or "
            f"{SYNTHETIC!r} for made-up samples."
        )
    return rows_of_file(path)


def _rows_of_folder(folder: Path) -> Iterator[tuple[Any, str]]:
    """Files of one stem are one sample: an image, a sound, and a text as the prompt."""
    by_stem: dict[str, dict[str, Any]] = {}
    unknown = []
    folders = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders.append(path.name)
            continue
        kind: Optional[str] = kind_of_file(path.name)
        value = path.name
        if path.suffix.lower() in _TEXTS:
            kind, value = "prompt", _prompt(path)
        elif kind is None:
            unknown.append(path.name)
            continue
        row = by_stem.setdefault(path.stem, {})
        if kind in row:
            raise ValueError(
                f"{str(folder)!r} has two files of kind {kind!r} named {path.stem!r}: "
                "rename one, or list them in a .jsonl file."
            )
        row[kind] = value
    tables = [name for name in unknown if is_data_file(Path(name))]
    if tables and not by_stem:
        raise ValueError(
            f"{str(folder)!r} holds no images, sounds and texts, but data: give one file "
            f"of it, such as {str(folder / tables[0])!r}."
        )
    if folders and not by_stem:
        raise ValueError(
            f"{str(folder)!r} holds no samples but perhaps in folders of its own, which "
            f"are not looked into: give one of them, such as "
            f"{str(folder / folders[0])!r}."
        )
    if folders:
        _LOGGER.warning(
            "%s has folders that are not looked into: %s.", folder, _few(folders)
        )
    if unknown:
        _LOGGER.warning(
            "%s has files that are no image, sound, video or text, and are left out: "
            "%s%s.",
            folder,
            _few(unknown),
            f"; to read {tables[0]}, give that file" if tables else "",
        )
    for stem, row in by_stem.items():
        # A text by itself is read as it is, without a chat around it.
        alone = list(row) == ["prompt"]
        yield {"text": row["prompt"]} if alone else row, f"{folder.name}/{stem}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8 ({error}).") from error


def _check_medium(part: Part, where: str) -> None:
    if part.kind == IMAGE:
        images.check_image(part.value, where)
    elif part.kind == AUDIO:
        sounds.check_audio(part.value, where)
    elif part.kind == VIDEO and isinstance(part.value, tuple):
        for frame in part.value:
            images.check_image(frame, where)
    elif part.kind == VIDEO:
        videos.check_video(part.value, where)
