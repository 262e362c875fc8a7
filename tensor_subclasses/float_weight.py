# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A smoothed weight in a float format, as :mod:`.smoothed_weight` has it in integers."""

from typing import Optional

import torch

from torchao_masquant.kernels.number_formats import NumberFormat

__all__ = [
    "dequantize_codes",
    "float_scales",
    "of_row_blocks",
    "rounded_codes",
    "steps",
]


def float_scales(
    smoothed: torch.Tensor,
    form: NumberFormat,
    group_size: Optional[int],
    factor: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Scales for a weight, by its format's rule.

    Args:
        smoothed: (N, K) float32, rotated where the weight is to be.
        form: the format.
        group_size: neighbours that share a scale, the format's where it has one; None
            for one scale per output channel.
        factor: (N, G), what to multiply the scales of the rule by; those of rows that
            share a scale are equal. None for ones.

    Returns:
        ``scale`` (N, G) float32, of values that the format's scales have, and
        ``row_scale`` (N,) float32, None where the format has none.
    """
    blocks = smoothed.unflatten(1, (-1, group_size or smoothed.shape[1]))
    largest = of_row_blocks(blocks.abs().amax(-1), form.rows, torch.amax)
    scale, row_scale = form.scales(largest, factor)
    return scale, None if row_scale is None else row_scale[:, 0]


def of_row_blocks(values: torch.Tensor, rows: int, reduced: object) -> torch.Tensor:
    """(N, G), each the result of its block of rows.

    Args:
        values: (N, G).
        rows: of a block; the last may have fewer.
        reduced: ``torch.amax`` or ``torch.sum``.
    """
    if rows == 1:
        return values
    assert callable(reduced)
    return torch.cat(
        [reduced(b, 0, keepdim=True).expand_as(b) for b in values.split(rows)]
    )


def steps(scale: torch.Tensor, row_scale: Optional[torch.Tensor]) -> torch.Tensor:
    """(N, G) float32, what a code's value is multiplied by.

    Args:
        scale: (N, G) floating point.
        row_scale: (N,) float32 or None.
    """
    scale = scale.float()
    return scale if row_scale is None else scale * row_scale[:, None]


def rounded_codes(
    smoothed: torch.Tensor,
    form: NumberFormat,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
) -> torch.Tensor:
    """(N, K) int8, the codes of the nearest values; arguments as above."""
    step = steps(scale, row_scale)
    blocks = smoothed.unflatten(1, (step.shape[1], -1))
    return form.grid.encode(form.grid.nearest(blocks / step[..., None])).flatten(1)


def dequantize_codes(
    codes: torch.Tensor,
    form: NumberFormat,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
) -> torch.Tensor:
    """(N, K) float32, what codes (N, K) stand for; arguments as above."""
    step = steps(scale, row_scale)
    blocks = form.grid.decode(codes).unflatten(1, (step.shape[1], -1))
    return (blocks * step[..., None]).flatten(1)
