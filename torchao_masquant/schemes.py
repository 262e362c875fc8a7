# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Numbers of bits of weights and activations."""

from dataclasses import dataclass
from typing import Optional

__all__ = ["SCHEMES", "Scheme", "get_scheme"]


@dataclass(frozen=True)
class Scheme:
    """Integer formats of a quantized linear.

    Attributes:
        name: as users write it.
        weight_bits: 8, 4 or 3. 3-bit integers are held in the storage of 4-bit ones:
            they show what 3 bits cost in accuracy, and save neither memory nor time
            over 4.
        act_bits: 2 to 8, symmetric, one scale per token, found at run time; fewer than
            8 bits are held in int8. 16: activations are not quantized.
        group_size: neighbours of an output channel that share one weight scale; None
            for one scale per output channel.
        symmetric: False for weights with a zero point per scale, which only
            activations that are not quantized can meet.
    """

    name: str
    weight_bits: int
    act_bits: int
    group_size: Optional[int] = None
    symmetric: bool = True

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they are."""
        return self.act_bits == 16


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", 8, 8),
        Scheme("w4a8", 4, 8),
        Scheme("w4a6", 4, 6),
        Scheme("w4a4", 4, 4),
        # Simulated: see Scheme.weight_bits.
        Scheme("w3a3", 3, 3),
        Scheme("w4a16", 4, 16, group_size=128, symmetric=False),
    )
}


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name, in small or capital letters: "w4a8" or "W4A8".

    Raises:
        ValueError: there is no such scheme.
    """
    scheme = SCHEMES.get(name.lower()) if isinstance(name, str) else None
    if scheme is None:
        raise ValueError(
            f"unknown scheme {name!r}: choose one of {', '.join(SCHEMES)}."
        )
    return scheme
