# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The checkout as git sees it: what the packaging tests look at."""

import functools
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
#: folder at the top of the repository to the package that it is
FOLDERS = {
    folder: package
    for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()
}


@functools.cache
def source_files() -> list[str]:
    """Every file that is tracked, or would be, as a path from the root."""
    listed = _listed_by_git() if (ROOT / ".git").exists() else None
    return sorted(_walked() if listed is None else listed)


def _listed_by_git() -> "list[str] | None":
    """What git lists; None where git is missing or refuses."""
    try:
        result = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    # A file that is deleted but not yet committed is still listed.
    return [f for f in result.stdout.split("\0") if f and (ROOT / f).is_file()]


def _walked() -> list[str]:
    """The files of an unpacked archive, without what was built there since."""
    skipped = {"__pycache__", "build", "dist", "demo-output"}
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not any(
            part in skipped or part.endswith(".egg-info") or part.startswith(".")
            for part in (parts[1:] if parts[0] == ".ci" else parts)
        ):
            found.append("/".join(parts))
    return found


def installed_path(file: str) -> "str | None":
    """Where an install puts a file of the checkout; None where it does not."""
    folder, _, rest = file.partition("/")
    if folder not in FOLDERS or not rest:
        return None
    return f"{FOLDERS[folder].replace('.', '/')}/{rest}"
