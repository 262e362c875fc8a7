# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Every python block and masquant command of the pages runs, in order."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from packaging.version import Version

from torchao_masquant.__main__ import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "checkpoints.md",
    ROOT / "docs" / "cli.md",
    ROOT / "docs" / "serving.md",
    *sorted((ROOT / "tutorials").glob("*.md")),
]


def _run_commands(block, page):
    """The masquant commands of a bash block; others are for the reader's machine."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "masquant":
            assert main(words[1:]) == 0, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert any(block.group(1) == "python" for block in blocks), page.name
    monkeypatch.chdir(tmp_path)
    # Where tests before this one compiled a class more often than Dynamo's limit allows,
    # Dynamo compiles it no more in this process.
    torch._dynamo.reset()
    if Version(torch.__version__) < Version("2.13"):
        if page.name == "deploy_with_aotinductor.md":
            pytest.skip("torch.export finds no bounds for the cache before 2.13")
        # As the README says.
        monkeypatch.setattr(torch._inductor.config, "assert_indirect_indexing", False)
    scope: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        language, source = block.groups()
        if language == "bash":
            _run_commands(source, page)
            continue
        line = text[: block.start()].count("\n") + 1
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + source, str(page), "exec"), scope)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    defined = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert targets and targets <= defined
