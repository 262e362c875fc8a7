# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much a quantized model differs from its original."""

from torchao_masquant.evaluation.sqnr import SQNR, linear_sqnr

__all__ = ["SQNR", "linear_sqnr"]
