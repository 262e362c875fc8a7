# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The method's formulas in float64, written from the mathematics alone."""

import numpy as np


def smooth(absmax, weight_absmax, alpha):
    s = absmax**alpha / np.maximum(weight_absmax, 1e-5) ** (1 - alpha)
    return np.maximum(s, 1e-5)


def check_rounded(integers, scale, weight, bits):
    """Whether integers are the nearest ones; returns what they stand for.

    Checked rather than computed again: the largest magnitude of a row lies on a
    boundary by construction (half a step beyond the positive end), where float32 and
    float64 round either way.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = np.abs(weight).max(1, keepdims=True) / ((high - low) / 2)
    step = np.where(step == 0, scale, step)
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert integers.min() >= low and integers.max() <= high
    # Half a step, and the float32 rounding of a value of up to 128 steps.
    assert (np.abs(integers - weight / step) <= 0.5 + 128 * 2**-22).all()
    return integers * scale


def truncated(x, difference, rank):
    """Best product of rank r for ``x @ product ~ x @ difference.T``, by the SVD of x.

    Needs no covariance and no eigenvalues: with ``x = P S V^T``, the best low-rank
    approximation of ``S V^T D^T`` is mapped back through ``V S^-1``.
    """
    _, sigma, vt = np.linalg.svd(x, full_matrices=False)
    keep = sigma > 1e-5 * sigma[0]
    sigma, vt = sigma[keep], vt[keep]
    target = (sigma[:, None] * vt) @ difference.T
    p, values, qt = np.linalg.svd(target, full_matrices=False)
    r = min(rank, len(values))
    return (vt.T / sigma) @ p[:, :r] @ (values[:r, None] * qt[:r])
