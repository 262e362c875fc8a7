# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Saving and loading through transformers, and through torchao.

Importing this package imports neither of them, nor torch: its parts that need them are
imported when they are first used.
"""
