# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Numbers of bits of weights and activations."""

from dataclasses import dataclass

__all__ = ["SCHEMES", "Scheme", "get_scheme"]


@dataclass(frozen=True)
class Scheme:
    """Integer formats of a quantized linear.

    Attributes:
        name: as users write it.
        weight_bits: 8 or 4; symmetric, one scale per output channel.
        act_bits: 8, 6 or 4; symmetric, one scale per token, found at run time. Fewer
            than 8 bits are held in int8.
    """

    name: str
    weight_bits: int
    act_bits: int


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", 8, 8),
        Scheme("w4a8", 4, 8),
        Scheme("w4a6", 4, 6),
        Scheme("w4a4", 4, 4),
    )
}


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name.

    Raises:
        ValueError: there is no such scheme.
    """
    if name not in SCHEMES:
        raise ValueError(
            f"unknown scheme {name!r}: choose one of {', '.join(SCHEMES)}."
        )
    return SCHEMES[name]
