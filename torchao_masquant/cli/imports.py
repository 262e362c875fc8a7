# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Libraries that are installed and yet cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Iterator, Optional

__all__ = ["NOT_INSTALLED", "failed_import", "try_imports"]

NOT_INSTALLED = "not installed"

# Imports what it is told to, and writes how each ended. What libraries print meanwhile
# goes to standard error.
_CHILD = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        found = ""
    except ModuleNotFoundError as error:
        found = None if error.name == name else str(error)
    except BaseException as error:
        lines = str(error).strip().splitlines()
        found = ": ".join([type(error).__name__, *lines[:1]])
    print(json.dumps(found), file=answers, flush=True)
"""

_SECONDS = 120

# Where an import passes through before it reaches the library that fails.
_BETWEEN = ("importlib", "_frozen_importlib", "transformers", "torchao_masquant")


def try_imports(names: Sequence[str]) -> dict[str, str]:
    """Import modules, in another process: one that crashes takes nothing with it.

    Returns:
        Name to "" for one that works, :data:`NOT_INSTALLED`, or why it does not work.
    """
    found: dict[str, str] = {}
    while len(found) < len(names):
        rest = [name for name in names if name not in found]
        told, end = _run(rest)
        for name, answer in zip(rest, told):
            found[name] = NOT_INSTALLED if answer is None else answer
        if len(told) < len(rest):
            found[rest[len(told)]] = end
    return {name: found[name] for name in names}


def _run(names: Sequence[str]) -> tuple[list[Optional[str]], str]:
    """What a process told before it ended, and how it ended."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _CHILD, *names],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS * len(names),
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        text = out.decode() if isinstance(out, bytes) else out
        return [json.loads(line) for line in text.splitlines()], "does not end"
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    return told, f"ends the process with code {ended.returncode}"


def failed_import(error: BaseException) -> Optional[tuple[str, str]]:
    """The library whose own import is what an error comes from.

    transformers imports what is installed when a class is asked for, and then names the
    class.

    Returns:
        Its name, and what it says; None where nothing lies behind the error.
    """
    cause = error
    while (behind := cause.__cause__ or cause.__context__) is not None:
        cause = behind
    if cause is error:
        return None
    for module in _modules(cause.__traceback__):
        if module not in _BETWEEN:
            lines = str(cause).strip().splitlines()
            return module, ": ".join([type(cause).__name__, *lines[:1]])
    return None


def _modules(traceback: Optional[TracebackType]) -> Iterator[str]:
    """Top-level packages of the frames, outermost first."""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__") or ""
        yield name.partition(".")[0]
        traceback = traceback.tb_next
