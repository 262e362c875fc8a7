# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is printed beside results: what this package says, and not what others load."""

import contextlib
import logging
import warnings
from typing import Any, Iterator

__all__ = ["plain_messages", "quiet_libraries"]

# They tell of libraries for other machines that do not load on this one, and of their
# own deprecations. What transformers warns of is about the model, and stays.
_LOGGERS = ("torchao", "torch.utils._pytree", "torch.utils.flop_counter", "triton")
_MODULES = r"(torch|torchao|triton)(\.|$)"


def _one_line(message: Any, *_: Any) -> str:
    return f"WARNING: {' '.join(str(message).split())}\n"


@contextlib.contextmanager
def plain_messages() -> Iterator[None]:
    """Inside, what this package tells by logging or warns of takes a line each, once.

    A command that checks beforehand what it does later meets the same twice.
    """
    ours = logging.getLogger(__name__.partition(".")[0])
    # Not the root's: other libraries print what they log themselves.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_known = message in told
        told.add(message)
        return not is_known

    handler.addFilter(is_new)
    ours.addHandler(handler)
    format_warning = warnings.formatwarning
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = format_warning
        ours.removeHandler(handler)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, nothing is printed of other libraries' loading."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=_MODULES)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
