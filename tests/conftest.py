# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Here so that pytest puts this folder on sys.path, for the helper modules in it.

Without a GPU the Triton kernels run on the CPU, in Triton's interpreter. It is chosen
by a variable that Triton reads when it is imported, which PyTorch's other packages do,
so it is set before any test is.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
