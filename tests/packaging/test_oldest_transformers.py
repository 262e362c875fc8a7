# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The oldest transformers that pyproject.toml admits, in place of the newest.

It is the one whose releases move what is relied on; ``make ends`` runs all tests at both
ends of every range.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from checkout import PYPROJECT, ROOT

# Families that it has moved or builds otherwise, and what goes from one to the other.
_TESTS = ["tests/integrations/test_names.py", "tests/integrations/test_families.py"]
_CHOSEN = "(test_names or Omni or 3n) and not compile"

_RUN = """
import sys
import pytest
import transformers
print(transformers.__version__, flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def _pip_install(*words: object) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    return subprocess.run([*pip, *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_models_whose_classes_differ_work_with_it(tmp_path):
    (oldest,) = (
        version
        for line in PYPROJECT["project"]["dependencies"]
        for version in re.findall(r"^transformers>=([\d.]+)", line)
    )
    wanted = f"transformers=={oldest}.*"
    report, site = tmp_path / "report.json", tmp_path / "site"
    installed = _pip_install("--dry-run", "--report", report, wanted)
    if not installed.returncode:
        # What the environment lacks; the rest of what it depends on is here already.
        lacking = [
            "{name}=={version}".format_map(package["metadata"])
            for package in json.loads(report.read_text())["install"]
        ]
        if lacking:
            # Most of its modules are not imported: those that are compile as they are.
            options = ("--no-compile", "--no-deps", "-t", site)
            installed = _pip_install(*options, *lacking)
    if installed.returncode:
        pytest.skip(f"{wanted} cannot be had: {installed.stderr.splitlines()[-1]}")
    tested = subprocess.run(
        [sys.executable, "-c", _RUN, "-k", _CHOSEN, *_TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert tested.stdout.startswith(f"{oldest}."), tested.stdout
