# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How a command ends: exit codes, and one sentence where it fails."""

import argparse
import os
import sys
from typing import Callable

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "UsageError",
    "WRONG_USAGE",
    "is_debugging",
    "run",
    "sentence",
]

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130

_DEBUG_VARIABLE = "MASQUANT_DEBUG"


class UsageError(ValueError):
    """Arguments that cannot be meant, or not together, on any machine and any model."""


def is_debugging(arguments: argparse.Namespace) -> bool:
    """Whether errors show where they come from."""
    return getattr(arguments, "debug", False) or bool(os.environ.get(_DEBUG_VARIABLE))


def run(
    command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
    """Run a command and turn what it raises into an exit code.

    Args:
        command: a module's ``main``.
        arguments: its own; ``debug`` among them lets errors through.

    Returns:
        Its own exit code; 1 where it raised, after one sentence on standard error; 130
        where it was interrupted.

    Raises:
        SystemExit: with 2, after the same, where it raised a :class:`UsageError`.
    """
    try:
        return command(arguments)
    except KeyboardInterrupt:
        # Where a progress bar was, the line is not finished.
        print("\ninterrupted: nothing is left half-written.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does. Nothing more can be
        # written, at the interpreter's end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if is_debugging(arguments):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        if isinstance(error, UsageError):
            # As the parser ends where it finds it.
            sys.exit(WRONG_USAGE)
        return FAILED


def sentence(error: Exception) -> str:
    """What an exception says, in one line that ends as a sentence does."""
    if isinstance(error, OSError) and error.strerror is not None:
        # The system's own errors hold a number and a name, and no sentence.
        name = error.filename
        where = "" if name is None else f" {os.fsdecode(name)!r}"
        return f"cannot read or write{where}: {error.strerror}."
    # str() of a KeyError is the key in quotes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = " ".join(text.split())
    if not isinstance(error, (ValueError, OSError, ImportError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith((".", "?", "!")) else f"{text}."
