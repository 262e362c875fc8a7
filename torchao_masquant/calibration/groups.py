# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which linears are fed the same tensor, found from the data flow."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["SharedInputs"]


class SharedInputs:
    """Tells linears that read one tensor (q/k/v, gate/up) from those that do not.

    Two calls share their input when they read the same values: the same live memory,
    unchanged between them, through views that differ in shape only. Tensors are
    watched, not kept: an input lives no longer than the model holds it.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        # Memory that an input occupied, to the linear that read it first.
        self._first_reader: dict[tuple, tuple[StorageWeakRef, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Weak references to storages are freed by hand: a copy would free them twice.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()

    def leader(self, name: str, x: torch.Tensor) -> str:
        """The linear that was first to read ``x``: ``name`` itself, or one before it."""
        storage = StorageWeakRef(x.untyped_storage())
        key = _memory(x, storage)
        known = self._first_reader.get(key)
        # A dead storage's address may be taken again by another tensor.
        if known is not None and not known[0].expired():
            return known[1]
        self._first_reader = {
            k: v for k, v in self._first_reader.items() if not v[0].expired()
        }
        self._first_reader[key] = (storage, name)
        return name


def _memory(x: torch.Tensor, storage: StorageWeakRef) -> tuple[Any, ...]:
    # Inference tensors count no versions, and may be written to all the same.
    version = x.double().sum().item() if x.is_inference() else x._version
    return (
        storage.cdata,
        x.storage_offset(),
        _rows(x),
        x.shape[-1],
        x.stride(-1),
        x.dtype,
        version,
    )


def _rows(x: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Where the rows of ``x`` lie, however they are counted: (number, stride), ..."""
    rows: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()):
        if size == 1:
            continue
        if rows and rows[-1][1] == size * stride:
            size *= rows.pop()[0]
        rows.append((size, stride))
    return tuple(rows)
