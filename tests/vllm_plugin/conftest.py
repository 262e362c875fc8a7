# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The server of the benchmarks, for tests that need one; and a model that sees."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    from subject import Subject

    return Subject(
        tmp_path_factory.mktemp("seeing"), "w4a8", with_images=True, hadamard_size=32
    )
