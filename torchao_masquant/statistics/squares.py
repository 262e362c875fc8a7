# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Sums of tokens' outer products with themselves."""

import torch

__all__ = ["add_squares"]

# Columns of tokens that are multiplied at a time: of a symmetric product of wide ones only
# the half below the diagonal is then computed.
_COLUMNS = 4096


def add_squares(outer: torch.Tensor, x: torch.Tensor) -> None:
    """Add ``x^T x`` to a symmetric (K, K)."""
    k = x.shape[1]
    if k <= _COLUMNS:
        outer.addmm_(x.t(), x)
        return
    for start in range(0, k, _COLUMNS):
        end = min(start + _COLUMNS, k)
        product = x[:, start:end].t() @ x[:, :end]
        outer[start:end, :end] += product
        outer[:start, start:end] += product[:, :start].t()
