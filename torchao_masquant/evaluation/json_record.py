# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Results as plain JSON, and back."""

import dataclasses
import json
import math
import os
import types
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.outputs import check_file

__all__ = ["JSONRecord"]

_Record = TypeVar("_Record", bound="JSONRecord")

_FORMAT = "format"


class JSONRecord:
    """A dataclass that is written to a JSON file and read from one.

    JSON has no nan and no infinity: they are written as the strings "nan", "inf" and
    "-inf".
    """

    #: what the file holds, as :func:`~torchao_masquant.outputs.kind_of` tells it
    KIND: ClassVar[str]
    #: names that, and its version
    FORMAT: ClassVar[str]
    #: fields with a default that files of before they were there do not have
    ADDED: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields, as dicts, lists, strings, finite numbers, booleans and None."""
        return {_FORMAT: self.FORMAT, **_encode(self)}

    @classmethod
    def from_json(cls: type[_Record], data: Any) -> _Record:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: ``data`` is something else, or a field is missing or unknown.
        """
        if not isinstance(data, dict) or data.get(_FORMAT) != cls.FORMAT:
            found = data.get(_FORMAT) if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"this is no {cls.__name__}: expected the format {cls.FORMAT!r}, got "
                f"{found!r}."
            )
        fields = {key: value for key, value in data.items() if key != _FORMAT}
        return _decode(cls, fields, cls.__name__)

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write to a JSON file: all of it, or nothing; over such a file alone.

        Raises:
            OSError: the file cannot be written.
            ValueError: something else is there.
        """
        path = Path(path)
        check_file(path, self.KIND)
        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        write_whole(path, text)

    @classmethod
    def load(cls: type[_Record], path: Union[str, os.PathLike]) -> _Record:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)} is no JSON file: {error}.") from None
        return cls.from_json(data)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    """``data`` as an instance of an annotation of the dataclasses."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        (inner,) = (a for a in get_args(kind) if a is not type(None))
        return _decode(inner, data, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        make: Any = kind
        hints = get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        added = set(getattr(kind, "ADDED", ()))
        if not isinstance(data, dict) or not names - added <= set(data) <= names:
            raise ValueError(
                f"{where} holds the fields {sorted(names)}, got "
                f"{sorted(data) if isinstance(data, dict) else data!r}."
            )
        return make(
            **{n: _decode(hints[n], v, f"{where}.{n}") for n, v in data.items()}
        )
    wrong = ValueError(f"{where} is not what it should be: got {data!r}.")
    if origin is dict:
        if not isinstance(data, dict):
            raise wrong
        inner = get_args(kind)[1]
        return {k: _decode(inner, v, f"{where}[{k!r}]") for k, v in data.items()}
    if origin is tuple:
        if not isinstance(data, list):
            raise wrong
        inner = get_args(kind)[0]
        return tuple(_decode(inner, v, f"{where}[{i}]") for i, v in enumerate(data))
    if kind is float and data in ("nan", "inf", "-inf"):
        return float(data)
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise wrong
    return kind(data)
