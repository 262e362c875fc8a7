# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibrating a model that does not fit in memory, one block at a time."""

from torchao_masquant.conductor.team import TeamError
from torchao_masquant.sequential.calibrate_sequential import calibrate_sequential
from torchao_masquant.sequential.run import SequentialResult

__all__ = ["SequentialResult", "TeamError", "calibrate_sequential"]
