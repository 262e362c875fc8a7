# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The rows of a file of data, each with where it stands in it."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from torchao_masquant.data.tables import TABLES, rows_of_table

__all__ = ["is_data_file", "rows_of_file"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}

# Of the files that are read.
_SUFFIXES = (".jsonl", ".json", ".ndjson", *_DELIMITERS, *TABLES)

# Where a file that is one object keeps its rows.
_ROWS = ("data", "rows", "examples", "samples", "instances")

_LONGEST = 2**31 - 1
_GZIP = b"\x1f\x8b"
_SPACE = " \t\r\n"


def is_data_file(path: Path) -> bool:
    """Whether a file has rows of data in it, by its name."""
    return Path(path.name.removesuffix(".gz")).suffix.lower() in _SUFFIXES


def rows_of_file(path: Path) -> Iterator[tuple[Any, str]]:
    """Each row of a file, and where it is.

    Args:
        path: of a file with a JSON value a line, with one JSON array, or with values that
            are separated by commas or tabs, each perhaps compressed by gzip; or of a
            parquet or an Arrow file. A text is UTF-8, or UTF-16 with a mark that says so.

    Raises:
        ValueError: it is none of these, or damaged; says the line.
        ImportError: a table's library is missing.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in TABLES:
        yield from rows_of_table(path)
    elif suffix in _DELIMITERS:
        yield from _of_csv(_text(path), path.name, _DELIMITERS[suffix])
    else:
        yield from _of_json(_text(path), path.name, suffix == ".json")


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
        # Of its own accord, json tells UTF-8 from UTF-16 and UTF-32 by the first bytes.
        return data.decode(json.detect_encoding(data[:4]))
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} is no text ({error}): give a file of {', '.join(_SUFFIXES)}."
        ) from error


def _of_csv(text: str, name: str, delimiter: str) -> Iterator[tuple[Any, str]]:
    # An image in base64 is longer than csv expects a value to be.
    limit = csv.field_size_limit(_LONGEST)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            # A line of another length is filled with None, and its rest is under None.
            if None in row or None in row.values():
                raise ValueError(
                    f"{where} has not as many values as the first line has columns."
                )
            yield dict(row), where
    except csv.Error as error:
        raise ValueError(
            f"{name} cannot be read after line {reader.line_num}: {error}."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _of_json(text: str, name: str, is_document: bool) -> Iterator[tuple[Any, str]]:
    # Not splitlines: a text may hold line separators that end no line of a file.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    first = lines[0][1].strip()
    is_array = first.startswith("[") and (len(lines) == 1 or not _is_json(first))
    if is_array and not _is_conversation(text):
        yield from _of_array(text, name)
    elif is_array or (is_document and (len(lines) == 1 or not _is_json(first))):
        document = _of_document(text, name)
        rows = _rows_in(document, name)
        if rows is None:
            yield document, f"{name}, line {lines[0][0]}"
        else:
            yield from ((row, f"{name}, row {n}") for n, row in enumerate(rows))
    else:
        for number, line in lines:
            where = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}.") from error
            yield row, where


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _is_conversation(text: str) -> bool:
    """Whether an array is one conversation, a list of messages, and no list of rows."""
    try:
        entry, _ = json.JSONDecoder().raw_decode(text, _skip(text, text.index("[") + 1))
    except ValueError:
        return False
    return isinstance(entry, dict) and (
        {"role", "content"} <= set(entry) or {"from", "value"} <= set(entry)
    )


def _of_document(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}, line {error.lineno} is no JSON: {error.msg}."
        ) from error


def _rows_in(document: Any, name: str) -> Optional[list[Any]]:
    """The list of rows in an object that has one; None where the object is a row."""
    if not isinstance(document, dict):
        return None
    for key in _ROWS:
        if isinstance(document.get(key), list):
            return document[key]
    if isinstance(document.get("annotations"), list):
        raise ValueError(
            f"{name} keeps its samples in several lists ({', '.join(document)}): give "
            "one list, of rows that have an image and what is said of it."
        )
    return None


def _of_array(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """Elements of a JSON array one by one: each has a line of its own, for the errors."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    row = -1
    while not text.startswith("]", position):
        row += 1
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}, line {line}, row {row}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}, line {error.lineno}, row {row} is no JSON: {error.msg}."
            ) from error
        yield value, where
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise ValueError(
                f"{where} is no JSON: the array does not go on after it with a comma, "
                "nor end with ']'."
            )
    if text[position + 1 :].strip():
        raise ValueError(f"{name} is no JSON: something follows the array.")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
