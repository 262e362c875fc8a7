# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where conversations come from: a JSONL file, a folder, a dataset, or nowhere."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Iterable, Sequence, Union

from torchao_masquant.data import images, sounds
from torchao_masquant.data.conversations import (
    AUDIO,
    IMAGE,
    Conversation,
    conversation_of,
)
from torchao_masquant.data.synthetic import synthetic_conversations

__all__ = ["SYNTHETIC", "read_conversations"]

_LOGGER = logging.getLogger(__name__)

#: name of the built-in samples, in place of a path
SYNTHETIC = "synthetic"

_TEXTS = (".txt",)
# What datasets.save_to_disk leaves in a folder.
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_conversations(
    source: Union[str, Path, Iterable[Any]],
    kinds: Sequence[str] = (IMAGE, AUDIO),
) -> list[Conversation]:
    """Read and check data, up to the headers of its images and sounds.

    Args:
        source: a ``.jsonl`` file, a folder, a dataset that ``save_to_disk`` wrote,
            "synthetic", or rows such as a `datasets` dataset gives; see
            :func:`conversation_of` for a row.
        kinds: of media that made-up samples are to have.

    Raises:
        FileNotFoundError: the source, or a file that it names, is not there.
        ValueError: it is empty, or a line, an image or a sound is damaged.
        ImportError: the library that reads it is missing.
    """
    if isinstance(source, (str, Path)):
        if str(source) == SYNTHETIC:
            return synthetic_conversations(kinds)
        conversations = _of_path(Path(source))
    else:
        conversations = [
            conversation_of(row, f"row {index}") for index, row in enumerate(source)
        ]
    if not conversations:
        name = repr(str(source)) if isinstance(source, (str, Path)) else "the data"
        raise ValueError(f"{name} is empty: give at least one sample.")
    for conversation in conversations:
        _check_media(conversation)
    return conversations


def _of_path(path: Path) -> list[Conversation]:
    if path.is_dir():
        if any((path / name).exists() for name in _SAVED_DATASET):
            return _of_saved_dataset(path)
        return _of_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no data {str(path)!r}: give a .jsonl file, a folder, or "
            f"{SYNTHETIC!r} for made-up samples."
        )
    return _of_jsonl(path)


def _of_jsonl(path: Path) -> list[Conversation]:
    conversations = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text: give a .jsonl file.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}.") from error
        conversations.append(conversation_of(row, where, path.parent))
    return conversations


def _of_saved_dataset(path: Path) -> list[Conversation]:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"{str(path)!r} is a saved dataset, which is read with the library "
            "datasets: pip install datasets."
        )
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{str(path)!r} has the splits {', '.join(found)}: give the folder of one."
        )
    return [
        conversation_of(row, f"{path.name}, row {index}")
        for index, row in enumerate(found)
    ]


def _of_folder(folder: Path) -> list[Conversation]:
    """Files of one stem are one sample: an image, a sound, and a text as the prompt."""
    by_stem: dict[str, dict[str, Any]] = {}
    unknown = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        suffix = path.suffix.lower()
        if suffix in images.EXTENSIONS:
            kind, value = IMAGE, path.name
        elif suffix in sounds.EXTENSIONS:
            kind, value = AUDIO, path.name
        elif suffix in _TEXTS:
            kind, value = "prompt", path.read_text(encoding="utf-8")
        else:
            unknown.append(path.name)
            continue
        row = by_stem.setdefault(path.stem, {})
        if kind in row:
            raise ValueError(
                f"{str(folder)!r} has two files of kind {kind!r} named {path.stem!r}: "
                "rename one, or list them in a .jsonl file."
            )
        row[kind] = value
    if unknown:
        _LOGGER.warning(
            "%s has files that are no image, sound or text, and are left out: %s.",
            folder,
            ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else ""),
        )
    return [
        conversation_of(
            # A text by itself is read as it is, without a chat around it.
            {"text": row["prompt"]} if list(row) == ["prompt"] else row,
            f"{folder.name}/{stem}",
            folder,
        )
        for stem, row in by_stem.items()
    ]


def _check_media(conversation: Conversation) -> None:
    for message in conversation.messages:
        for part in message.parts:
            if not isinstance(part.value, Path):
                continue
            if part.kind == IMAGE:
                images.check_image(part.value, conversation.where)
            elif part.kind == AUDIO:
                sounds.check_audio(part.value, conversation.where)
