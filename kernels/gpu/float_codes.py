# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Codes of number formats in Triton: made of float32, and turned into what is multiplied.

A kernel knows what codes stand for by MANTISSA, the bits of a mantissa: 3 is e4m3, 1 is
e2m1, and of those that have none 0 is an integer of 4 bits, -1 one of 8. All that is done
here is done with integers and with products of powers of two, so it is exact, the same on
every GPU, and needs no instruction of a GPU's for such floats.

Those of 4 bits fit in e4m3, without a table:

- e2m1 has the exponents of e4m3 with another bias: its bits moved to where those of e4m3
  are stand for 2^-6 of the value;
- an integer's size is the mantissa of a subnormal number: it stands for 2^-9 of the value.

MI300 multiplies another e4m3 ("fnuz"), whose bias is one more, so that a code stands for
half of the value, and in which the code of -0 is nan: that one becomes 0.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu.linear_tiles import load_block
from torchao_masquant.kernels.number_formats import number_format

__all__ = [
    "E4M3",
    "E8M0",
    "FLOAT32",
    "NONE",
    "Operand",
    "as_bytes",
    "as_e4m3",
    "as_fnuz",
    "decoded",
    "e8m0_value",
    "encoded",
    "factor_of_e4m3",
    "load_scale",
    "mantissa_of",
    "spread",
]


def mantissa_of(name: Optional[str], bits: int = 8) -> int:
    """MANTISSA of a number format, or of integers of some bits, which have no name."""
    if name is None:
        return 0 if bits <= 4 else -1
    return {8: 3, 4: 1}[number_format(name).grid.bits]


class Operand(NamedTuple):
    """What a kernel is told of tokens or of a weight.

    Attributes:
        mantissa: see above.
        scale: what multiplies its groups: one of NONE, FLOAT32, E8M0 and E4M3.
        group: neighbours that share one; 0 with NONE.
    """

    mantissa: int
    scale: int
    group: int

    @classmethod
    def of(
        cls, name: Optional[str], bits: int, scale: torch.Tensor, in_features: int
    ) -> "Operand":
        """That of a number format, or of integers of some bits.

        Args:
            name: of the format; None: integers.
            bits: of an integer.
            scale: (R, G). One float32 of a whole row is left to the epilogue.
            in_features: K.
        """
        kind = _KINDS[scale.dtype]
        groups = scale.shape[1]
        mantissa = mantissa_of(name, bits)
        if kind == FLOAT32.value and groups == 1:
            return cls(mantissa, NONE.value, 0)
        return cls(mantissa, kind, in_features // groups)

    @property
    def per_byte(self) -> int:
        return 2 if self.mantissa in (0, 1) else 1


# What scales of groups are.
NONE, FLOAT32, E8M0, E4M3 = (tl.constexpr(kind) for kind in range(4))
_KINDS = {
    torch.float32: FLOAT32.value,
    torch.float8_e8m0fnu: E8M0.value,
    torch.float8_e4m3fn: E4M3.value,
}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of one byte an element as uint8: Triton has no name for all of them."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def factor_of_e4m3(mantissa: int) -> float:
    """What a value is multiplied by where its code is read as e4m3."""
    return {3: 1.0, 1: 2.0**6, 0: 2.0**9}[mantissa]


@triton.jit
def encoded(values: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """Codes, int32, of the values nearest to float32, ties to even.

    What is beyond the largest value becomes that one. nan has any code.
    """
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 1
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 6.0
    SIGN: tl.constexpr = 7 if MANTISSA == 3 else 3
    LOST: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(values), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    # Half of the last place that stays, less one unless that place is odd.
    half: tl.constexpr = (1 << (LOST - 1)) - 1
    normal = (bits + half + ((bits >> LOST) & 1)) >> LOST
    normal -= (127 - BIAS) << MANTISSA
    # Added to 1.5 * 2**23, a float of this size rounds to an integer, half to even, which
    # is in the lowest bits of the sum.
    STEPS: tl.constexpr = 2.0 ** (BIAS + MANTISSA - 1)
    steps = (size * STEPS + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    SMALLEST: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(size < SMALLEST, steps, normal)
    negative = (values.to(tl.int32, bitcast=True) >> 31) & 1
    return code | (negative << SIGN)


@triton.jit
def decoded(codes: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """Values, float32, of codes, uint8; those of 4 bits have nothing above them.

    By way of float16, whose exponents have room for these and which has subnormals
    everywhere.
    """
    wide = codes.to(tl.int32)
    if MANTISSA <= 0:
        TOP: tl.constexpr = 8 if MANTISSA == 0 else 128
        values = ((wide ^ TOP) - TOP).to(tl.float32)
    else:
        SIGN: tl.constexpr = 7 if MANTISSA == 3 else 3
        FACTOR: tl.constexpr = 256.0 if MANTISSA == 3 else 16384.0
        size = (wide & ((1 << SIGN) - 1)) << (10 - MANTISSA)
        half = (size | ((wide >> SIGN) << 15)).to(tl.uint16)
        values = half.to(tl.float16, bitcast=True).to(tl.float32) * FACTOR
    return values


@triton.jit
def as_e4m3(codes: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """Codes of e4m3, uint8, whose values are those of ``codes`` but for a factor."""
    if MANTISSA == 1:
        codes = ((codes & 7) << 2) | ((codes & 8) << 4)
    elif MANTISSA == 0:
        codes = tl.where(codes > 7, (16 - codes) | 0x80, codes).to(tl.uint8)
    return codes


@triton.jit
def as_fnuz(codes: tl.tensor) -> tl.tensor:
    """MI300's e4m3 of half of what codes of e4m3, uint8, stand for."""
    codes = tl.where(codes == 0x80, 0, codes).to(tl.uint8)
    return codes.to(tl.float8e4b8, bitcast=True)


@triton.jit
def load_scale(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(R, BLOCK_K / GROUP) float32, of the groups of a block; zeros past what is left.

    rows are addresses (R, 1) of uint8 of SCALE; a group begins at k.
    """
    group = tl.arange(0, BLOCK_K // GROUP)
    held = load_block(rows, k // GROUP, left // GROUP, group, EVEN_K)
    if SCALE == E8M0:
        scale = e8m0_value(held)
    else:
        scale = decoded(held, 3)
    return scale


@triton.jit
def e8m0_value(scale: tl.tensor) -> tl.tensor:
    """Powers of two, float32, of uint8; nan of 255, and 0 of 0, which no scale has."""
    power = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.where(scale == 255, float("nan"), power)


@triton.jit
def spread(scale: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """(R, G) scales as (R, G * GROUP), each beside itself GROUP times."""
    rows: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(scale, 2), (rows, groups, GROUP))
    return tl.reshape(wide, (rows, groups * GROUP))
