# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibrations in a process of their own, killed without a warning."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, Callable, Optional

import tiny_models
import torch

from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.sequential.block_store import BlockStore

# What a killed process must not be in the middle of without harm.
_STEPS = ("replace", "fsync", "rename", "link", "unlink", "rmdir")


def context() -> Any:
    """Processes that come with everything imported."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torchao_masquant.sequential", __name__])
    return found


def _samples() -> list[dict[str, Any]]:
    return tiny_models.samples(audio=False)


def calibrate(
    model: Path,
    folder: Path,
    die_at: Optional[int] = None,
    samples: Callable[[], list[dict[str, Any]]] = _samples,
    **options: Any,
) -> None:
    """Calibrate a tiny model into ``folder``.

    Args:
        model: of the original.
        folder: for the checkpoint "quantized" and "recipe.safetensors".
        die_at: number of the file operation that the process is killed at.
        samples: makes them; those of Qwen2.5-VL where it is not given.
    """
    torch.set_num_threads(1)
    if die_at is not None:
        _die_at(die_at)
    calibrate_sequential(
        model,
        samples(),
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **options,
    )


class Stop(Exception):
    """Ends a run in the middle."""


def stop_at(patch: Any, index: int) -> None:
    """Let runs end where a block has been solved for, and is to be written.

    Args:
        patch: a pytest ``monkeypatch``.
        index: of the block.
    """
    finish = BlockStore.finish

    def stop(store: BlockStore, part: str, *args: Any, **kwargs: Any) -> None:
        if part == store.part_of(index):
            raise Stop
        finish(store, part, *args, **kwargs)

    patch.setattr(BlockStore, "finish", stop)


def _die_at(number: int) -> None:
    left = number

    def counted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return run

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))
