# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What may be written where: over what is ours alone, and never over an original."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any, Iterable, Optional, Union

__all__ = [
    "CACHE_FILE",
    "CACHE_FORMAT",
    "QUANT_METHOD",
    "RECIPE_FORMAT",
    "check_file",
    "check_folder",
    "kind_of",
]

#: in the config.json of a quantized model
QUANT_METHOD = "masquant"

#: in the header of a recipe's file
RECIPE_FORMAT = "torchao_masquant.recipe"

#: likewise, of what a quantized cache knows of a model
CACHE_FORMAT = "torchao_masquant.kv_cache"

#: its name in the folder of a quantized model; engines take ``*.safetensors`` for weights
CACHE_FILE = "kv_cache.masquant"

_KINDS = {
    "recipe": "recipe",
    "cache": "recipe of a quantized cache",
    "evaluation": "result of 'masquant eval'",
    "analysis": "result of 'masquant analyze'",
    "page": "page of 'masquant report'",
    "figure": "figure of 'masquant report'",
    "model": "quantized model",
    "demo": "result of 'masquant demo'",
    "package": "package of 'masquant export'",
}

# Names that transformers gives a meaning in a model's folder.
_MEANT = re.compile(
    r"(model|pytorch_model|adapter_model|consolidated|tokenizer|vocab).*"
    r"|.*config\.json|.*\.index\.json|(added|special)_tokens.*\.json|chat_template.*"
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

# A JSON file or an HTML page says what it is within so many bytes.
_HEAD = 4096
_LARGEST_HEADER = 100_000_000

_PathLike = Union[str, os.PathLike]


def kind_of(path: _PathLike) -> Optional[str]:
    """Which of our outputs lies at a path, as its content tells, whatever its name.

    Returns:
        "recipe"; "cache", of a quantized cache; "evaluation" or "analysis", a JSON file; "page"; "figure"; "model", a
        folder; "demo", the folder of a demonstration, or its JSON file; or None, for
        anything else and where nothing is.
    """
    path = Path(path)
    if path.is_dir():
        entry = _json(path / "config.json").get("quantization_config")
        if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD:
            return "model"
        is_demo = (path / "model.pt").is_file() and "scheme" in _json(
            path / "quantization.json"
        )
        return "demo" if is_demo else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD)
        if head.startswith(b"\x89PNG"):
            return "figure" if b"torchao_masquant" in head else None
        if b'<meta name="generator" content="torchao_masquant' in head:
            return "page"
        if head.lstrip().startswith(b"{"):
            found = re.search(rb'"format": *"torchao_masquant\.([a-z]+)\.\d', head)
            kind = found[1].decode() if found else ""
            return kind if kind in _KINDS else None
        file.seek(0)
        kinds = {RECIPE_FORMAT: "recipe", CACHE_FORMAT: "cache"}
        return kinds.get(_safetensors_format(file) or "")


def check_file(
    path: _PathLike,
    kind: str,
    *,
    overwrite: bool = True,
    sources: Iterable[_PathLike] = (),
) -> None:
    """Raise where a file must not, or cannot, be written.

    Args:
        path: of the file.
        kind: as :func:`kind_of` has it; a file of another kind is never replaced.
        overwrite: whether one of this kind may be.
        sources: folders and files that are read, and must stay as they are.

    Raises:
        ValueError: something else is there, or would be changed.
        OSError: it cannot be written.
    """
    path = Path(path)
    shown = f"cannot write {os.fspath(path)!r}:"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{shown} there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"{shown} it is a folder; give the name of a file.")
    real = Path(os.path.realpath(path))
    # Where a link leads, a new file takes the old one's place.
    if not os.access(real.parent, os.W_OK):
        raise PermissionError(f"{shown} the folder {str(real.parent)!r} is read-only.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{shown} it is no ordinary file; give the name of one.")
    for source in map(Path, sources):
        if source.is_file() and path.exists() and path.samefile(source):
            raise ValueError(
                f"{shown} it is what is read; give the name of another file."
            )
    in_model = (real.parent / "config.json").is_file()
    if in_model and not path.exists() and _MEANT.fullmatch(real.name):
        raise ValueError(
            f"{shown} {str(real.parent)!r} holds a model, which would take it for a "
            "part of its own; give another name."
        )
    # An empty one holds nothing to lose.
    if not path.exists() or path.stat().st_size == 0:
        return
    if kind_of(path) != kind:
        raise ValueError(
            f"{shown} it is there already, and is no {_KINDS[kind]}, so it is not "
            "written over; give the name of another file."
        )
    if not overwrite:
        raise ValueError(
            f"{shown} it is there already; add --overwrite, or give another name."
        )


def check_folder(
    path: _PathLike,
    kind: str = "model",
    *,
    overwrite: bool = True,
    beside_others: bool = False,
    sources: Iterable[_PathLike] = (),
) -> None:
    """Raise where a folder must not, or cannot, be written.

    Args:
        path: of the folder; it and those around it need not be there.
        kind: "model" or "demo", a folder of another kind is never replaced; or
            "package", which never is.
        overwrite: whether one of this kind may be.
        beside_others: whether a folder will do that has files, and no model among them.
        sources: folders and files that are read, and must stay as they are.

    Raises:
        ValueError: something else is there, or would be changed.
        OSError: it cannot be written.
    """
    path = Path(path)
    shown = f"cannot write {os.fspath(path)!r}:"
    real = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{shown} it is a file; give a folder.")
    around = next(p for p in (real, *real.parents) if p.exists())
    if not around.is_dir():
        raise NotADirectoryError(f"{shown} {str(around)!r} is a file.")
    # A new folder takes the place of the old one, beside it.
    place = real.parent if around == real else around
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{shown} the folder {str(place)!r} is read-only.")
    for source in map(Path, sources):
        _check_apart(shown, real, source)
    if not path.exists() or not any(path.iterdir()):
        return
    if kind_of(path) == kind:
        if not overwrite:
            raise ValueError(
                f"{shown} it is there already; add --overwrite, or give another name."
            )
    elif not beside_others or _holds_model(path):
        raise ValueError(
            f"{shown} it is there already, and holds no {_KINDS[kind]}, so it is not "
            "written over; give a new folder."
        )


def _check_apart(shown: str, target: Path, source: Path) -> None:
    """Raise where one of two paths lies in the other; names may differ, and links."""
    if not source.exists():
        return
    source = Path(os.path.realpath(source))
    if any(p.exists() and p.samefile(source) for p in (target, *target.parents)):
        what = "it is" if target.exists() and target.samefile(source) else "it lies in"
        raise ValueError(
            f"{shown} {what} what is read, {str(source)!r}, which must stay as it is; "
            "give a folder beside it."
        )
    if target.exists() and any(p.samefile(target) for p in source.parents):
        raise ValueError(
            f"{shown} what is read, {str(source)!r}, lies in it; give a folder beside "
            "it."
        )


def _holds_model(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()]
    return "config.json" in names or any(n.endswith(_WEIGHTS) for n in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _safetensors_format(file: Any) -> Optional[str]:
    """What the header of a safetensors file calls its format."""
    try:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _LARGEST_HEADER:
            return None
        metadata = json.loads(file.read(size)).get("__metadata__")
        return metadata.get("format") if isinstance(metadata, dict) else None
    except (struct.error, ValueError, AttributeError):
        return None
