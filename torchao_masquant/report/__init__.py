# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One HTML page about how a model was quantized."""

from torchao_masquant.report.page import Report, write_report

__all__ = ["Report", "write_report"]
