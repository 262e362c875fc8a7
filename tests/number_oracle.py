# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Number formats written down again, bit by bit, in float64 and Python's own numbers."""

import math
from dataclasses import dataclass
from typing import Optional

import torch


def float_value(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """What the bits of an OCP float without infinities stand for."""
    mantissa = bits & (2**mantissa_bits - 1)
    exponent = bits >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if bits >> (mantissa_bits + exponent_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        return sign * mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


#: Values by code, nan where a code has none.
E4M3 = [float_value(b, 4, 3) if b & 0x7F != 0x7F else math.nan for b in range(256)]
E2M1 = [float_value(b, 2, 1) for b in range(16)]


def nearest_code(value: float, values: list[float]) -> int:
    """The code of the nearest value, ties to even codes, the sign of zero kept."""
    negative = math.copysign(1.0, value) < 0
    half = len(values) // 2
    sizes = [v for v in values[:half] if not math.isnan(v)]
    size = min(abs(value), max(sizes))
    best = min(range(len(sizes)), key=lambda code: (abs(sizes[code] - size), code % 2))
    return best + half * negative


@dataclass(frozen=True)
class Format:
    """One of the formats.

    Attributes:
        values: by code.
        scale: "float32", "e4m3" or "e8m0".
        group: None for a row.
        reach: what a scale is made for.
    """

    values: list[float]
    scale: str
    group: Optional[int]
    reach: float

    def scales(self, rows: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """(R, G) and, of two levels, (R, 1), float32, of float32 rows (R, K)."""
        group = self.group or rows.shape[1]
        largest = rows.abs().unflatten(1, (-1, group)).amax(-1)
        if self.scale == "float32":
            return (largest / self.reach).clamp_min(2.0**-126), None
        if self.scale == "e8m0":
            ratio = (largest / self.reach).double().clamp_min(2.0**-126)
            return torch.tensor(
                [
                    [2.0 ** math.ceil(math.log2(r)) for r in row]
                    for row in ratio.tolist()
                ]
            ), None
        row = (largest.amax(1, keepdim=True) / (256 * self.reach)).clamp_min(2.0**-116)
        wanted = (largest / (row * self.reach)).clamp_min(2.0**-9)
        found = [[E4M3[nearest_code(v, E4M3)] for v in r] for r in wanted.tolist()]
        return torch.tensor(found), row

    def rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (R, K), 0 to 255 or 0 to 15, and what they stand for, float64."""
        scale, row = self.scales(rows)
        step = scale if row is None else scale * row
        step = step.repeat_interleave(rows.shape[1] // step.shape[1], 1)
        codes = torch.tensor(
            [[nearest_code(v, self.values) for v in r] for r in (rows / step).tolist()]
        )
        values = torch.tensor(self.values, dtype=torch.float64)[codes]
        exact = scale.double() if row is None else scale.double() * row.double()
        return codes, values * exact.repeat_interleave(
            rows.shape[1] // exact.shape[1], 1
        )


FORMATS = {
    "e4m3": Format(E4M3, "float32", None, 448.0),
    "e4m3-128": Format(E4M3, "float32", 128, 448.0),
    "nvfp4": Format(E2M1, "e4m3", 16, 6.0),
    "mxfp4": Format(E2M1, "e8m0", 32, 7.0),
    "mxfp8": Format(E4M3, "e8m0", 32, 448.0),
}
