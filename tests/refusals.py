# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Whoever is refused something gets one clear sentence."""

import contextlib
from typing import Iterator

import pytest


@contextlib.contextmanager
def refused(
    match: str, error: type[Exception] = ValueError
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """What is done inside raises: a sentence in which ``match`` is found."""
    with pytest.raises(error, match=match) as raised:
        yield raised
    message = str(raised.value)
    assert message.endswith(".") and "\n" not in message, message
