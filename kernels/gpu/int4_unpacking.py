# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A block of 4-bit weights, which lie two to a byte, unpacked in registers.

To int8: into the *upper* half of bytes, 16 times their value: a shift or a mask each,
with no sign to extend. A sum of products is 16 times as large, and is divided by 16
exactly. It fits in int32 as long as that of 8-bit weights does: to
``K * 127 * 128 < 2**31``.

To themselves, for floats of 4 bits and what is made of them.

To 16 bits: as numbers that are larger by an offset, which is free to take away together
with the zero point.

Rows are addresses (BLOCK_N, 1); k is where the block begins, in features; inner and
inner_bytes are the ranges of BLOCK_K and BLOCK_K / 2. What lies past the features that
are left is any number, and is to be multiplied by zeros.
"""

import triton
import triton.language as tl

__all__ = ["UNPACK_BF16", "UNPACK_FP16", "load_half", "load_nibbles", "load_upper"]

# A byte below an exponent's is a number of 16 bits: 0x43nn is 128 + nn in bfloat16 and
# 0x64nn is 1024 + nn in float16. prmt puts two nibbles below two of them at once. The
# nibbles have their sign turned around before, so that they are q + 8.
UNPACK_BF16 = tl.constexpr(
    """{
    .reg .b32 low, high, shifted;
    and.b32 low, $4, 0x0F0F0F0F;
    xor.b32 low, low, 0x08080808;
    shr.b32 shifted, $4, 4;
    and.b32 high, shifted, 0x0F0F0F0F;
    xor.b32 high, high, 0x08080808;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 $2, high, 0x43434343, 0x4140;
    prmt.b32 $3, high, 0x43434343, 0x4342;
    }"""
)
UNPACK_FP16 = tl.constexpr(UNPACK_BF16.value.replace("0x43434343", "0x64646464"))


@triton.jit
def _pairs(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner_bytes: tl.tensor,
    EVEN_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K / 2) uint8, from an even k on."""
    at = rows + (k // 2 + inner_bytes)[None, :]
    if EVEN_K:
        pairs = tl.load(at)
    else:
        pairs = tl.load(at, mask=(2 * inner_bytes < left)[None, :], other=0)
    return pairs


@triton.jit
def _pair_of_each(
    rows: tl.tensor, k: tl.tensor, left: tl.tensor, inner: tl.tensor
) -> tuple:
    """(BLOCK_N, BLOCK_K) uint8 that hold each weight, and whether it is the upper half.

    A group of odd width may begin in the middle of a byte.
    """
    pairs = tl.load(
        rows + ((k + inner) // 2)[None, :], mask=(inner < left)[None, :], other=0
    )
    return pairs, ((k + inner) & 1 == 1)[None, :]


@triton.jit
def load_nibbles(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    inner_bytes: tl.tensor,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K) uint8, as they are, with zeros above."""
    if WIDTH % 2 == 0:
        pairs = _pairs(rows, k, left, inner_bytes, EVEN_K)
        nibbles = tl.join(pairs & 0xF, pairs >> 4).reshape(BLOCK_N, BLOCK_K)
    else:
        pairs, odd = _pair_of_each(rows, k, left, inner)
        nibbles = tl.where(odd, pairs >> 4, pairs & 0xF)
    return nibbles


@triton.jit
def load_upper(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    inner_bytes: tl.tensor,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K) int8, 16 times the weights."""
    if WIDTH % 2 == 0:
        pairs = _pairs(rows, k, left, inner_bytes, EVEN_K)
        if PTX:
            # Four bytes at once; one by one takes twice the instructions.
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 shifted;
                shl.b32 shifted, $2, 4;
                and.b32 $0, shifted, 0xF0F0F0F0;
                and.b32 $1, $2, 0xF0F0F0F0;
                }""",
                "=r,=r,r",
                [pairs],
                dtype=(tl.uint8, tl.uint8),
                is_pure=True,
                pack=4,
            )
        else:
            low = pairs << 4
            high = pairs & 0xF0
        upper = tl.join(low, high).reshape(BLOCK_N, BLOCK_K)
    else:
        pairs, odd = _pair_of_each(rows, k, left, inner)
        upper = tl.where(odd, pairs & 0xF0, pairs << 4)
    return upper.to(tl.int8, bitcast=True)


@triton.jit
def load_half(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    inner_bytes: tl.tensor,
    half: tl.constexpr,
    operand: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K) ``operand``, each weight plus an offset.

    ``half`` is tl.bfloat16 or tl.float16. The offset is 8 where no instruction of PTX
    unpacks, or WIDTH is odd, else 136 in bfloat16 and 1032 in float16.
    """
    if WIDTH % 2 == 0:
        pairs = _pairs(rows, k, left, inner_bytes, EVEN_K)
        if PTX and half == tl.float16:
            low, high = tl.inline_asm_elementwise(
                UNPACK_FP16,
                "=r,=r,=r,=r,r",
                [pairs],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        elif PTX:
            low, high = tl.inline_asm_elementwise(
                UNPACK_BF16,
                "=r,=r,=r,=r,r",
                [pairs],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low = ((pairs & 0xF) ^ 8).to(tl.float32).to(operand)
            high = ((pairs >> 4) ^ 8).to(tl.float32).to(operand)
        weights = tl.join(low, high).reshape(BLOCK_N, BLOCK_K)
    else:
        pairs, odd = _pair_of_each(rows, k, left, inner)
        nibbles = tl.where(odd, pairs >> 4, pairs & 0xF) ^ 8
        weights = nibbles.to(tl.float32).to(operand)
    return weights
