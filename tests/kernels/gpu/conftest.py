# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Triton's interpreter runs the kernels of this folder on the CPU.

The interpreter is chosen when a kernel is defined, so the variable is set before any
of them is imported. Kernels are imported nowhere else without a GPU.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
