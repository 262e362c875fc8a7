# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The operators' formulas in numpy float64, and how far float32 may be from them.

Nothing here calls the package. ``UNIT`` is float32's unit roundoff: one float32
operation has a relative error of at most ``UNIT``.
"""

from typing import NamedTuple, Optional

import numpy as np
import torch
from hadamard_oracle import rotated_f64

UNIT = 2.0**-24

# Unit roundoff and smallest subnormal number of the types a result may have.
_OUT = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-24),
}


def f64(tensor: torch.Tensor) -> np.ndarray:
    """Exact: float64 holds every value of the narrower types."""
    return tensor.detach().to(torch.float64).numpy()


class Quantized(NamedTuple):
    """Rounded levels of an activation.

    Attributes:
        levels: (T, K) ``(x * p - o) / s``, not yet rounded.
        scale: (T, 1).
        slack: (T, K) how far float32 may be from a level.
        tie: (T, K) whether float32 may round the level to either neighbour.
    """

    levels: np.ndarray
    scale: np.ndarray
    slack: np.ndarray
    tie: np.ndarray


def smooth_quantize_f64(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> Quantized:
    quant_max = 2 ** (act_bits - 1) - 1
    rows = np.zeros(x.shape[0], dtype=np.int64)
    if modality_ids is not None:
        rows = modality_ids.numpy().astype(np.int64)
    # The product of two 24-bit mantissas has 48 bits: exact in float64.
    smoothed = f64(x) * f64(act_pre_scale)[rows]
    slack = UNIT * np.abs(smoothed)
    if act_shift is not None:
        smoothed = smoothed - f64(act_shift)[rows]
        slack = slack + UNIT * np.abs(smoothed)
    smoothed, slack = rotated_f64(smoothed, slack, hadamard_size)
    scale = np.abs(smoothed).max(-1, keepdims=True) / quant_max
    levels = np.divide(smoothed, scale, out=np.zeros_like(smoothed), where=scale > 0)
    # Behind a level lie the product and the difference, those of the scale, its
    # division, and the division by it.
    widest = slack.max(-1, keepdims=True) / quant_max
    slack = np.divide(
        slack + widest * np.abs(levels),
        scale,
        out=np.zeros_like(smoothed),
        where=scale > 0,
    )
    slack += 3 * UNIT * np.abs(levels)
    tie = np.abs(levels - np.floor(levels) - 0.5) <= slack
    return Quantized(levels, scale, slack, tie)


def assert_integers(
    qdata: torch.Tensor, expected: Quantized, ties: float = 0.01
) -> None:
    """Bit-exact, but for levels that float32 can't tell from a rounding boundary."""
    q = qdata.numpy().astype(np.float64)
    wrong = (q != np.round(expected.levels)) & ~expected.tie
    assert not wrong.any(), (q[wrong], expected.levels[wrong])
    # A tie must still be one of the two neighbours.
    assert (np.abs(q - expected.levels) <= 0.5 + expected.slack).all()
    assert expected.tie.mean() <= ties, "the inputs leave nothing to check"


def int_linear_f64(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    weight: np.ndarray,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) result and, of each element, the sum of the magnitudes of its terms.

    Args:
        weight: (N, K) integers, unpacked.
    """
    q = qx.numpy().astype(np.int64)
    w = weight.astype(np.int64)
    tokens, in_features = q.shape
    groups = scale.shape[1]
    width = in_features // groups
    y = np.zeros((tokens, w.shape[0]))
    size = np.zeros_like(y)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        term = (q[:, columns] @ w[:, columns].T) * f64(scale)[:, g] * f64(x_scale)
        y += term
        size += np.abs(term)
    if low_rank_hidden is not None:
        assert l2 is not None
        y += f64(low_rank_hidden) @ f64(l2)
        size += np.abs(f64(low_rank_hidden)) @ np.abs(f64(l2))
    if modality_bias is not None:
        rows = [0] * tokens if modality_ids is None else modality_ids.tolist()
        y += f64(modality_bias)[rows]
        size += np.abs(f64(modality_bias)[rows])
    if bias is not None:
        y += f64(bias)
        size += np.abs(f64(bias))
    return y, size


def assert_within(
    actual: torch.Tensor,
    expected: np.ndarray,
    size: np.ndarray,
    operations: int,
) -> None:
    """``operations`` float32 roundings of at most ``size``, then the result's own."""
    assert actual.shape == expected.shape
    unit, smallest = _OUT[actual.dtype]
    tolerance = operations * UNIT * size * (1 + unit) + unit * np.abs(expected)
    error = np.abs(f64(actual) - expected)
    assert (error <= tolerance + smallest).all(), (
        f"error {error.max():.3g}, {(error / (tolerance + smallest)).max():.3g} of the "
        "tolerance"
    )


def bfloat16_operations(x: torch.Tensor) -> int:
    """What rounding both sides of a product to bfloat16 weighs in float32 roundings.

    Where a processor multiplies bfloat16, more than 16 such tokens may meet their
    dequantized weight in it, as in any bfloat16 linear.
    """
    rounded = x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > 16
    return round(2 * 2.0**-8 / UNIT) if rounded else 0


def ids_for(tokens: int, modalities: int, seed: int = 0) -> torch.Tensor:
    """Every modality occurs, where there are tokens enough; in no order."""
    ids = torch.arange(tokens) % modalities
    return ids[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]
