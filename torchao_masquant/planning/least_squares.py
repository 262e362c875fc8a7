# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Coefficients of a sum of terms, from what was measured."""

from typing import Sequence

import numpy as np

__all__ = ["non_negative_fit"]


def non_negative_fit(
    features: Sequence[Sequence[float]], values: Sequence[float]
) -> list[float]:
    """Coefficients, none negative, of least squares of relative errors.

    Args:
        features: of each measurement, the terms.
        values: that were measured, above zero.
    """
    matrix = np.asarray(features, dtype=np.float64) / np.asarray(values)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(values)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(found * np.linalg.norm(matrix[:, used], axis=0))))
    coefficients = np.zeros(matrix.shape[1])
    coefficients[used] = np.maximum(found, 0)
    return [float(c) for c in coefficients]
