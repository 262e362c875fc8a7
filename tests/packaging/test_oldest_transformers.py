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

_RUN = """
import sys
import pytest
import transformers
print(transformers.__version__, flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_models_whose_classes_differ_work_with_it(tmp_path):
    (oldest,) = (
        version
        for line in PYPROJECT["project"]["dependencies"]
        for version in re.findall(r"^transformers>=([\d.]+)", line)
    )
    wanted = f"transformers=={oldest}.*"
    # Most of its modules are not imported: those that are compile as they are.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile"]
    installed = subprocess.run(
        [*pip, "-t", tmp_path, wanted], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"{wanted} cannot be had: {installed.stderr.splitlines()[-1]}")
    tested = subprocess.run(
        [sys.executable, "-c", _RUN, "-k", _CHOSEN, *_TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert tested.stdout.startswith(f"{oldest}."), tested.stdout
