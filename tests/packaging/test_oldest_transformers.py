# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The oldest transformers that pyproject.toml admits, in place of the newest.

It is the one whose releases move what is relied on; ``make ends`` runs all tests at both
ends of every range.
"""

import os
import re
import subprocess
import sys

import pytest
from checkout import PYPROJECT, ROOT

# Families that it has moved or builds otherwise, and what goes from one to the other.
_TESTS = ["tests/integrations/test_names.py", "tests/integrations/test_families.py"]
_CHOSEN = "(test_names or Omni or 3n) and not compile"


@pytest.mark.slow
def test_models_whose_classes_differ_work_with_it(tmp_path):
    (oldest,) = (
        version
        for line in PYPROJECT["project"]["dependencies"]
        for version in re.findall(r"^transformers>=([\d.]+)", line)
    )
    wanted = f"transformers=={oldest}.*"
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "-t", tmp_path, wanted],
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        pytest.skip(f"{wanted} cannot be had: {installed.stderr.splitlines()[-1]}")
    version = "import transformers; print(transformers.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    told = subprocess.run([sys.executable, "-c", version], **options)
    assert told.stdout.startswith(f"{oldest}."), told.stderr
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run([*pytest_, "-k", _CHOSEN, *_TESTS], **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
