# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures: how they look, what they are made of, and how they become SVG and PNG.

What is drawn is decided where the numbers are: see ``evaluation/*_figures.py`` and
``report/*_figures.py``.
"""
