# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The wheel of the source archive, built once for all tests of this folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, source_files
from filelock import FileLock

_BUILD_SDIST = (
    "from setuptools.build_meta import build_sdist; build_sdist('../archive')"
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the archive lacks, its wheel lacks: it shows that both are whole."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # All workers have the one that is built first.
        folder = folder.parent
    with FileLock(folder / "wheel.lock"):
        if not (folder / "wheel").exists():
            _build(folder / "building").rename(folder / "wheel")
    (built,) = (folder / "wheel").glob("*.whl")
    return built


def _build(folder: Path) -> Path:
    # A copy of the checkout: a build leaves its own folders where it runs.
    for file in source_files():
        target = folder / "source" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target)
    _run([sys.executable, "-c", _BUILD_SDIST], folder / "source")
    (archive,) = (folder / "archive").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    _run([*pip, "--no-index", "--wheel-dir", str(folder / "wheel"), "."], unpacked)
    return folder / "wheel"


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
