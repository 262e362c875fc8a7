# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Runs what a page of the documentation tells its reader to."""

import re
import shlex
from pathlib import Path
from typing import Any

from torchao_masquant.__main__ import main

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: Of the hub; in its place stands a tiny random model that is made on the spot.
HUB_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


def has_blocks(page: Path) -> bool:
    return bool(re.search(r"^(```python|masquant )", page.read_text(), re.M))


def run_blocks(page: Path) -> dict[str, Any]:
    """Every python block and masquant command, in order; returns the blocks' names."""
    text = page.read_text()
    scope: dict[str, Any] = {"__name__": "readme"}
    for block in _BLOCK.finditer(text):
        language, source = block.groups()
        source = source.replace(HUB_MODEL, "model")
        if language == "bash":
            _run_commands(source, page)
            continue
        line = text[: block.start()].count("\n") + 1
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + source, str(page), "exec"), scope)
    return scope


def _run_commands(block: str, page: Path) -> None:
    """The masquant commands of a bash block; others are for the reader's machine."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "masquant":
            assert main(words[1:]) == 0, f"{page.name}: {line}"
