# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which tiling a kernel runs with: measured ones first, else a rule of thumb.

Measured tilings come from a JSON file of the architecture in the user's cache, which
tuning writes (:mod:`torchao_masquant.kernels.gpu.measuring`)::

    {"int_linear w8": {"2048x2048x11008": {"blocks": {...}, "num_warps": 8, ...},
                       "2048x256x2048": {"library": "int_mm"}}}

A key has the sizes that a kernel is tuned for, tokens rounded up to a power of two. An
entry may also say that no tiling wins, but a library's product does
(:mod:`torchao_masquant.kernels.gpu.library_products`).
"""

import contextlib
import contextvars
import functools
import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import torch

from torchao_masquant.kernels.cpu_build import cache_folder
from torchao_masquant.kernels.gpu.launching import TileConfig, size_hint

__all__ = [
    "Entry",
    "LibraryProduct",
    "Question",
    "choose",
    "forget_tables",
    "linear_name",
    "measured",
    "questions",
    "table_name",
    "tuning_key",
    "user_table",
]


class LibraryProduct(NamedTuple):
    """An entry that says that a library wins.

    Attributes:
        library: name of one of ``library_products``.
    """

    library: str

    def to_json(self) -> dict[str, Any]:
        return {"library": self.library}


Entry = Union[TileConfig, LibraryProduct]


def _entry(value: Mapping[str, Any]) -> Entry:
    if "library" in value:
        return LibraryProduct(str(value["library"]))
    return TileConfig.from_json(value)


class Question(NamedTuple):
    """What :func:`choose` was asked.

    Attributes:
        kernel: name in the tables.
        key: from :func:`tuning_key`.
        configs: to choose from.
    """

    kernel: str
    key: str
    configs: tuple[TileConfig, ...]


_asked: contextvars.ContextVar[Optional[list[Question]]] = contextvars.ContextVar(
    "asked", default=None
)


@contextlib.contextmanager
def questions() -> Iterator[list[Question]]:
    """Collects what calls inside ask for, so that it can be measured for them."""
    asked: list[Question] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def tuning_key(tokens: Union[int, torch.SymInt], *sizes: int) -> str:
    """The entry of a table for a call: tokens to the next power of two, then sizes."""
    rounded = 1 << max(size_hint(tokens) - 1, 0).bit_length()
    return "x".join(str(size) for size in (rounded, *sizes))


def linear_name(operator: str, weight_bits: int, grouped: bool) -> str:
    """The name in the tables of a linear with one kind of weight.

    Args:
        operator: "int_linear" or "weight_only_linear".
        weight_bits: up to 4 are packed, two to a byte.
        grouped: a channel has several scales.
    """
    return f"{operator} w{4 if weight_bits <= 4 else 8}{' group' if grouped else ''}"


def table_name(device: torch.device) -> Optional[str]:
    """The architecture of a device, as tables are named; None where there is none.

    "sm_90" for an H100, "gfx942" for an MI300.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def user_table(name: str) -> Path:
    """Where tuning on this machine leaves what it measured."""
    return cache_folder() / f"triton_{name}.json"


@functools.lru_cache(maxsize=None)
def _measured(name: str) -> dict[str, dict[str, Entry]]:
    path = user_table(name)
    if not path.exists():
        return {}
    try:
        return {
            kernel: {key: _entry(value) for key, value in entries.items()}
            for kernel, entries in json.loads(path.read_text()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no table of tilings ({error}): delete it."
        ) from error


def forget_tables() -> None:
    """Read them again at the next call: one was written."""
    _measured.cache_clear()


def measured(kernel: str, key: str, device: torch.device) -> Optional[Entry]:
    """The entry of the tables for a call; None where nothing was measured.

    Args:
        kernel: name in the tables.
        key: from :func:`tuning_key`.
        device: of the call.

    Raises:
        ValueError: a table is damaged.
    """
    name = table_name(device)
    return None if name is None else _measured(name).get(kernel, {}).get(key)


def choose(
    kernel: str,
    key: str,
    configs: Sequence[TileConfig],
    fallback: TileConfig,
    device: torch.device,
) -> TileConfig:
    """The tiling for one call.

    Args:
        kernel: name in the tables, with the variants that are tuned apart.
        key: from :func:`tuning_key`.
        configs: those that the kernel knows; an entry of a table that is none of them
            (left by another version) is not taken.
        fallback: where nothing was measured.
        device: of the call.

    Raises:
        ValueError: a table is damaged.
    """
    asked = _asked.get()
    if asked is not None:
        asked.append(Question(kernel, key, tuple(configs)))
    found = measured(kernel, key, device)
    return found if isinstance(found, TileConfig) and found in configs else fallback
