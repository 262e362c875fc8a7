# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Registers the operators, and leaves out what does not run on this machine."""

import importlib.util
import os
from typing import Any, Iterator

import pytest
from quick_interpreter import spare_repeated_work

import torchao_masquant  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
            spare_repeated_work(monkeypatch.setattr)
        yield


@pytest.fixture(autouse=True)
def _runs_here(request: pytest.FixtureRequest) -> None:
    spec: Any = getattr(request.node, "callspec", None)
    backend = spec and spec.params.get("backend")
    if backend and backend.why_not():
        pytest.skip(backend.why_not())
