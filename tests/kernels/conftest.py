# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Registers the operators: most tests of this folder call them and nothing else."""

import torchao_masquant  # noqa: F401
