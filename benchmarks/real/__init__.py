# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The benchmark on a real language model that is taught to see and hear."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]

# What the methods are compared with, and what trains the small model.
sys.path[:0] = [str(_ROOT / "research"), str(_ROOT / "tools")]
