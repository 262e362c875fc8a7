# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Every python block of the README, of docs and of the tutorials runs, in order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "checkpoints.md",
    *sorted((ROOT / "tutorials").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} shows no python"
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        # Blank lines in front, so that a traceback names the page's own line.
        source = "\n" * line + block.group(1)
        exec(compile(source, str(page), "exec"), scope)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    defined = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets and targets <= defined
