# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Error feedback by the book: one column at a time, with inverses written out."""

import numpy as np


def gptq(weight, hessian, scale, zero_point, low, high, damping):
    """GPTQ (arXiv 2210.17323) as optimal brain quantization states it.

    The inverse of what is left of the Hessian is found anew before every column; no
    Cholesky factor, no blocks.
    """
    weight, k = weight.copy(), weight.shape[1]
    damped = hessian + damping * np.trace(hessian) / k * np.eye(k)
    width = k // scale.shape[1]
    left = sorted(range(k), key=lambda j: -hessian[j, j])
    integers = np.zeros(weight.shape, dtype=int)
    while left:
        j = left[0]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        step, zero = scale[:, j // width], zero_point[:, j // width]
        integers[:, j] = np.clip(np.round(weight[:, j] / step + zero), low, high)
        error = weight[:, j] - (integers[:, j] - zero) * step
        weight[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return integers


def nearest(weight, scale, zero_point, low, high):
    """Each weight on its own."""
    width = weight.shape[1] // scale.shape[1]
    step, zero = np.repeat(scale, width, 1), np.repeat(zero_point, width, 1)
    return np.clip(np.round(weight / step + zero), low, high).astype(int)


def loss(weight, integers, hessian, scale, zero_point):
    """``tr(E H E^T)``."""
    width = weight.shape[1] // scale.shape[1]
    step, zero = np.repeat(scale, width, 1), np.repeat(zero_point, width, 1)
    error = weight - (integers - zero) * step
    return np.trace(error @ hessian @ error.T)
