# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What libraries say about themselves, kept from a user who asked for something else."""

import contextlib
import logging
import warnings
from typing import Any, Iterator

__all__ = ["quiet_libraries"]

# They tell of libraries for other machines that do not load on this one, and of their
# own deprecations. What transformers warns of is about the model, and stays.
_LOGGERS = ("torchao", "torch.utils._pytree", "torch.utils.flop_counter", "triton")
_MODULES = r"(torch|torchao|triton)(\.|$)"


def _one_line(message: Any, *_: Any) -> str:
    return f"WARNING: {' '.join(str(message).split())}\n"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, nothing is printed of libraries' loading; warnings of ours take a line."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    format_warning = warnings.formatwarning
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=_MODULES)
        warnings.formatwarning = _one_line  # type: ignore[assignment]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            warnings.formatwarning = format_warning
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
