# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which tiling a kernel runs with: measured ones first, else a rule of thumb.

Measured tilings come from two JSON files of one form, first the user's own, which
tuning writes, then the one shipped for the architecture::

    {"int_linear w8": {"2048x2048x11008": {"blocks": {...}, "num_warps": 8, ...}}}

A key has the sizes that a kernel is tuned for, tokens rounded up to a power of two.
"""

import functools
import json
import os
from pathlib import Path
from typing import Optional, Sequence, Union

import torch

from torchao_masquant.kernels.cpu_build import cache_folder
from torchao_masquant.kernels.gpu.launching import TileConfig, size_hint

__all__ = ["choose", "table_name", "tuning_key", "user_table"]

_TABLES = Path(__file__).parent / "tables"


def tuning_key(tokens: Union[int, torch.SymInt], *sizes: int) -> str:
    """The entry of a table for a call: tokens to the next power of two, then sizes."""
    rounded = 1 << max(size_hint(tokens) - 1, 0).bit_length()
    return "x".join(str(size) for size in (rounded, *sizes))


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
def _measured(name: str) -> dict[str, dict[str, TileConfig]]:
    found: dict[str, dict[str, TileConfig]] = {}
    for path in (_TABLES / f"{name}.json", user_table(name)):
        if not os.path.exists(path):
            continue
        try:
            for kernel, entries in json.loads(path.read_text()).items():
                found.setdefault(kernel, {}).update(
                    {key: TileConfig.from_json(e) for key, e in entries.items()}
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no table of tilings ({error}): delete it."
            ) from error
    return found


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
    name = table_name(device)
    if name is None:
        return fallback
    found = _measured(name).get(kernel, {}).get(key)
    return found if found is not None and found in configs else fallback
