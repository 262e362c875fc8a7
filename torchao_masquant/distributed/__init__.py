# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized models on several devices."""

from torchao_masquant.distributed.parallel_plan import tensor_parallel

__all__ = ["tensor_parallel"]
