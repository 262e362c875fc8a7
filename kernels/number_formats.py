# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Number formats: the values that a weight or a token is rounded to, and their scales.

A format is a grid of values, and a rule that makes scales. ``value = code * scale``, where
a *code* is the number's bits in an int8: an integer is its own code, that of e4m3 is its
byte, that of e2m1 its nibble, sign-extended as a 4-bit integer is. So all of them are held,
packed and sliced alike, and what differs is what a code stands for.

========= ======= ============================ ==========================================
format    values  scales                       named so by
========= ======= ============================ ==========================================
e4m3      e4m3    float32, one a row           torchao's float8, by row
e4m3-128  e4m3    float32, 128 neighbours      DeepSeek: blocks of 128 x 128 in a weight
nvfp4     e2m1    e4m3, 16 neighbours, times   NVIDIA; the float32 scale is a row's or a
                  a float32 of the row         token's own, where theirs is a tensor's
mxfp4     e2m1    e8m0, 32 neighbours          OCP Microscaling Formats 1.0
mxfp8     e4m3    e8m0, 32 neighbours          as above
========= ======= ============================ ==========================================

Rounding is to the nearest value, ties to the even code, and what is beyond the largest
value becomes that one: what the conversions of GPUs do (``cvt.rn.satfinite``). Scales are
never zero nor subnormal, so that a reciprocal of them is finite. Where the largest value of
what shares a scale is inf or nan, the scale is nan: so is then all that it serves.
"""

import functools
from dataclasses import dataclass
from typing import Mapping, Optional

import torch

from torchao_masquant.kernels.int4_packing import pack_int4, unpack_int4

__all__ = [
    "FORMATS",
    "INTEGERS",
    "Grid",
    "NumberFormat",
    "grid_of",
    "number_format",
]

_TINY = torch.finfo(torch.float32).tiny

# The smallest positive e4m3, and a row's scale whose product with it is far from subnormal.
_LEAST_E4M3 = 2.0**-9
_LEAST_ROW = 2.0**-116

# What the scale of a row's largest group becomes in e4m3: not 448, so that a search may
# make it larger.
_LARGEST_GROUP = 256.0

_E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Grid:
    """Values that can be held in some bits; this one holds integers.

    Attributes:
        bits: of a code.
        largest: value.
        dtype: of what holds codes in memory.
        per_byte: neighbours of a row that share a byte.
    """

    bits: int
    largest: float
    dtype: torch.dtype
    per_byte: int = 1

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Each value's nearest on the grid, of the same floating point type."""
        return values.round().clamp(-self.largest - 1, self.largest)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes, int8, of floating point values that are on the grid; nan has any."""
        return values.to(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values, float32, of codes, int8."""
        return codes.float()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., K), int8, as they are held in memory."""
        return pack_int4(codes) if self.per_byte == 2 else codes.view(self.dtype)

    def unpack(self, held: torch.Tensor, in_features: int) -> torch.Tensor:
        """Undo :meth:`pack`.

        Args:
            held: (..., K) or (..., ceil(K / 2)).
            in_features: K.
        """
        if self.per_byte == 2:
            return unpack_int4(held, in_features)
        return held.view(torch.int8)


class _E4M3(Grid):
    """OCP's 8-bit floats with 4 bits of exponent: no infinities, ``largest`` is 448."""

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(values)).to(values.dtype)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        # Older versions of torch turn what is beyond into nan.
        within = values.clamp(-self.largest, self.largest)
        return within.to(torch.float8_e4m3fn).view(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        # A table is five times as fast as torch's conversion on a CPU.
        return _looked_up(_e4m3_values(codes.device), codes.view(torch.uint8))


class _E2M1(Grid):
    """OCP's 4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        size = values.abs()
        coarse = torch.where(size < 4, size.round(), (size / 2).round() * 2)
        size = torch.where(size < 2, (size * 2).round() / 2, coarse)
        return size.clamp(max=self.largest).copysign(values)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        doubled = (values.abs() * 2).nan_to_num(0.0).to(torch.int32)
        codes = _looked_up(_e2m1_codes(values.device), doubled)
        return torch.where(values.signbit(), codes - 8, codes)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return _looked_up(_e2m1_values(codes.device), codes & 0xF)


def _looked_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    found = table.index_select(0, indices.reshape(-1).to(torch.int32))
    return found.view(indices.shape)


@functools.lru_cache(maxsize=None)
def _e4m3_values(device: torch.device) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float().to(device)


@functools.lru_cache(maxsize=None)
def _e2m1_values(device: torch.device) -> torch.Tensor:
    sizes = torch.tensor(_E2M1_SIZES)
    return torch.cat([sizes, -sizes]).to(device)


@functools.lru_cache(maxsize=None)
def _e2m1_codes(device: torch.device) -> torch.Tensor:
    """(13,) int8: twice a value to its code."""
    codes = torch.zeros(13, dtype=torch.int8)
    for code, value in enumerate(_E2M1_SIZES):
        codes[int(2 * value)] = code
    return codes.to(device)


_E4M3_GRID = _E4M3(8, 448.0, torch.float8_e4m3fn)
_E2M1_GRID = _E2M1(4, 6.0, torch.uint8, per_byte=2)


#: Bits of a weight to its integers, two's complement; 3 bits are held as 4 are.
INTEGERS: Mapping[int, Grid] = {
    8: Grid(8, 127, torch.int8),
    4: Grid(4, 7, torch.uint8, per_byte=2),
    3: Grid(3, 3, torch.uint8, per_byte=2),
}


@dataclass(frozen=True)
class NumberFormat:
    """A grid of floats, and how scales for it are made.

    Attributes:
        name: of it.
        grid: values, before they are scaled.
        scale_dtype: float32; float8_e4m3fn, times a float32 scale of the row; or
            float8_e8m0fnu, powers of two.
        group_size: neighbours that share a scale; None: a row has one.
        rows: of a weight that share their scales, for hardware that multiplies in such
            blocks.
        reach: times a scale, the largest value that the scale is made for. It is the
            grid's largest, or beyond it, where cutting a little off costs less than
            doubling the step.
        trials: what a search over scales multiplies those of ``reach`` by.
    """

    name: str
    grid: Grid
    scale_dtype: torch.dtype
    group_size: Optional[int]
    reach: float
    trials: tuple[float, ...]
    rows: int = 1

    @property
    def two_levels(self) -> bool:
        """Whether there is a float32 scale of the row besides."""
        return self.scale_dtype == torch.float8_e4m3fn

    def scales(
        self, largest: torch.Tensor, factor: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Scales for what they have to reach.

        Args:
            largest: (R, G) float32, the largest absolute value of what shares a scale.
            factor: (R, G) float32, or what broadcasts to it, to multiply them by before
                they are rounded to what they are held in; None for ones.

        Returns:
            (R, G) float32, of values that ``scale_dtype`` has, and (R, 1) float32 of
            the rows where ``two_levels``, else None.
        """
        finite = largest.isfinite()
        row = None
        if self.two_levels:
            row = largest.amax(-1, keepdim=True) / (_LARGEST_GROUP * self.reach)
            row = row.clamp_min(_LEAST_ROW)
            scale = largest / (row * self.reach)
        else:
            scale = largest / self.reach
        if factor is not None:
            scale = scale * factor
        if row is not None:
            scale = _E4M3_GRID.nearest(scale.clamp_min(_LEAST_E4M3))
            row = torch.where(finite.all(-1, keepdim=True), row, torch.nan)
        elif self.scale_dtype == torch.float8_e8m0fnu:
            scale = _power_of_two(scale)
        return torch.where(finite, scale.clamp_min(_TINY), torch.nan), row

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """(R, K) float32, each row to the nearest values of this format."""
        width = values.shape[1]
        blocks = values.unflatten(1, (-1, self.group_size or width))
        scale, row = self.scales(blocks.abs().amax(-1))
        step = (scale if row is None else scale * row)[..., None]
        return (self.grid.nearest(blocks / step) * step).flatten(1)


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The least one that is no smaller, of positive float32, 2 ** 127 at most."""
    bits = values.clamp_min(_TINY).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) > 0)
    return (exponent.clamp(max=254) << 23).view(torch.float32)


# Scales between one and twice it: the same relative precision, at other values. A search
# finds the one that a row's or a block's values happen to suit.
_WITHIN_AN_OCTAVE = tuple(2.0 ** (eighth / 8) for eighth in range(8))

#: All formats by name.
FORMATS: Mapping[str, NumberFormat] = {
    entry.name: entry
    for entry in (
        NumberFormat("e4m3", _E4M3_GRID, torch.float32, None, 448.0, _WITHIN_AN_OCTAVE),
        NumberFormat(
            "e4m3-128",
            _E4M3_GRID,
            torch.float32,
            128,
            448.0,
            _WITHIN_AN_OCTAVE,
            rows=128,
        ),
        # 1.5 is "four over six": a scale by which the largest becomes 4 has values at 3/4
        # and 1/2 of it, where one by which it becomes 6 has none between 2/3 and 1.
        NumberFormat(
            "nvfp4",
            _E2M1_GRID,
            torch.float8_e4m3fn,
            16,
            6.0,
            (1.0, 1.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.1, 1.2, 1.3, 1.4),
        ),
        # What is between 6 and 7 costs less cut off than twice the step would.
        NumberFormat(
            "mxfp4", _E2M1_GRID, torch.float8_e8m0fnu, 32, 7.0, (1.0, 2.0, 0.5)
        ),
        # Of powers of two the least that cuts nothing off is the best there is.
        NumberFormat("mxfp8", _E4M3_GRID, torch.float8_e8m0fnu, 32, 448.0, (1.0,)),
    )
}


def number_format(name: str) -> NumberFormat:
    """Look a format up.

    Raises:
        ValueError: there is none of that name.
    """
    found = FORMATS.get(name)
    if found is None:
        raise ValueError(
            f"unknown number format {name!r}: choose one of {', '.join(FORMATS)}."
        )
    return found


def grid_of(bits: int, name: Optional[str]) -> Grid:
    """What codes of a weight stand for.

    Args:
        bits: of a code.
        name: of its number format; None: integers.
    """
    return INTEGERS[bits] if name is None else number_format(name).grid
