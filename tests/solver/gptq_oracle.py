# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Error feedback by the book: one column at a time, with inverses written out."""

import numpy as np

# GPTQ's: of the mean diagonal, added to it.
DAMPING = 0.01


def assert_gptq(integers, weight, hessian, scale, zero_point, low, high, noise=0.0):
    """That integers are those of GPTQ (arXiv 2210.17323), to within float32.

    As optimal brain quantization states it: the inverse of what is left of the Hessian is
    found anew before every column; no Cholesky factor, no blocks. Every integer has to be
    the nearest to what the integers before it leave to be rounded: where that lies on a
    boundary to within float32, either neighbour is right, and what follows from it too.
    """
    weight, k = weight.copy(), weight.shape[1]
    ridge = DAMPING * np.trace(hessian) / k + noise
    damped = hessian + ridge * np.eye(k)
    width = k // scale.shape[1]
    left = sorted(range(k), key=lambda j: -hessian[j, j])
    # Of all that was added up: float32 holds each to 2^-24 of it.
    added = np.abs(weight)
    ties = 0
    assert low <= integers.min() and integers.max() <= high
    while left:
        j = left[0]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        step, zero = scale[:, j // width], zero_point[:, j // width]
        levels = weight[:, j] / step + zero
        slack = 2.0**-24 * (k + 8) * (added[:, j] / step + np.abs(zero) + 1)
        assert slack.max() < 0.01
        off = np.abs(np.clip(levels, low, high) - integers[:, j])
        assert (off <= 0.5 + slack).all(), (j, off.max())
        ties += (off > 0.5 - slack).sum()
        error = weight[:, j] - (integers[:, j] - zero) * step
        moved = np.outer(error / inverse[0, 0], inverse[0])
        weight[:, left] -= moved
        added[:, left] += np.abs(moved)
        left = left[1:]
    # The largest of a scale is half a step beyond its grid; of the others few are ties,
    # or the integers would say nothing.
    assert ties <= scale.size + 0.01 * integers.size


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
