# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rotations by Hadamard matrices in Triton, of tiles that are in registers.

The additions of :mod:`torchao_masquant.kernels.hadamard` in their order, so the bits are
those of the reference. In the first stage ``a`` and ``c`` may be products, which a compiler
would contract with the addition into a single rounding; as in
:mod:`~torchao_masquant.kernels.gpu.smooth_quantize` ``a`` is multiplied by ``one``, a number
that the compiler does not know, in the same instruction.
"""

from typing import Sequence

import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.launching import TileConfig

__all__ = ["rotated", "rotated_in_blocks_of", "stages_of"]


@triton.jit
def _stage(values: tl.tensor, one: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    pairs = tl.reshape(values, (values.numel // (2 * HALF), 2, HALF))
    a, c = tl.split(tl.permute(pairs, (0, 2, 1)))
    if HALF == 1:
        both = tl.join(tl.fma(a, one, c), tl.fma(a, one, -c))
    else:
        both = tl.join(a + c, a - c)
    return tl.reshape(tl.permute(both, (0, 2, 1)), values.shape)


@triton.jit
def rotated(values: tl.tensor, one: tl.tensor, STAGES: tl.constexpr) -> tl.tensor:
    """A tile whose rows' blocks of 2 ** STAGES neighbours are rotated."""
    for stage in tl.static_range(STAGES):
        values = _stage(values, one, 2**stage)
    if STAGES > 0:
        factor: tl.constexpr = (2**STAGES) ** -0.5
        values = values * factor
    return values


def stages_of(hadamard_size: int) -> int:
    """``STAGES`` of a rotation; 0 of one of size 1, which is none."""
    return hadamard_size.bit_length() - 1


def rotated_in_blocks_of(
    operator: str,
    config: TileConfig,
    larger: Sequence[TileConfig],
    hadamard_size: int,
) -> TileConfig:
    """A tiling whose tiles hold whole blocks of a rotation.

    Args:
        operator: for the message.
        config: that is taken where it does.
        larger: in whose place the first of these is taken that does.
        hadamard_size: b.

    Raises:
        ValueError: none of them does.
    """
    for found in (config, *larger):
        if hadamard_size <= found["BLOCK_K"]:
            return found
    raise ValueError(
        f"{operator}: a rotation of {hadamard_size} neighbours does not fit in the "
        f"registers of a program, which hold {larger[-1]['BLOCK_K']}: quantize with a "
        "smaller hadamard_size."
    )
