# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibration: statistics of a model's activations, and the recipe made of them."""

from torchao_masquant.calibration.calibrate import calibrate
from torchao_masquant.calibration.sensitivity import modality_sensitivity

__all__ = ["calibrate", "modality_sensitivity"]
