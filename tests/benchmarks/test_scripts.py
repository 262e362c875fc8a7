# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Benchmarks start as their pages say: as scripts, with nothing else on the path."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
#: What lies in folders that a script's own path does not have.
FURTHER = {
    path.stem for folder in ("research", "tools") for path in (ROOT / folder).iterdir()
}


def _imported(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    return [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []


@pytest.mark.parametrize("script", BENCHMARKS.glob("*.py"), ids=lambda path: path.name)
def test_folders_are_on_the_path_before_what_is_in_them(script: Path) -> None:
    """``import real`` puts them there, or the script itself."""
    found = False
    for statement in ast.parse(script.read_text()).body:
        names = [name.split(".")[0] for name in _imported(statement)]
        found = found or "real" in names or "sys.path" in ast.unparse(statement)
        assert found or not FURTHER & set(names), ast.unparse(statement)
