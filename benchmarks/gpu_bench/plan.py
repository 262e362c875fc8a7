# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the GPU benchmark measures, and in which order.

The most telling numbers of tokens come first, so that a run that is cut short has them;
torchao's candidates, which tune themselves for long, are measured in steps of their own
beside what they are compared with.
"""

import math
from dataclasses import dataclass
from typing import Optional, Sequence

from gpu_bench.roofline import DEVICES, Device, LinearCall, Work, int_linear, linears

from torchao_masquant.options import SCHEMES

__all__ = [
    "BF16",
    "BF16_FUSED",
    "FP8_PRODUCT",
    "GROUPS",
    "INT8_PRODUCT",
    "MIXES",
    "RANK",
    "SHAPES",
    "TOKENS",
    "TORCHAO",
    "PRODUCT",
    "Place",
    "Step",
    "card_named",
    "paper",
    "plan",
    "rank_of",
    "works",
]

# (in_features, out_features) and the linears that have it. Both Qwen2.5-Omni thinkers have
# the shapes of the Qwen2.5-VL model of their size.
SHAPES: dict[tuple[int, int], str] = {
    (3584, 18944): "7B gate/up",
    (18944, 3584): "7B down",
    (3584, 3584): "7B q/o",
    (2048, 11008): "3B gate/up",
    (11008, 2048): "3B down",
    (2048, 2048): "3B q/o",
    (3584, 512): "7B k/v",
    (2048, 256): "3B k/v",
}
# in_features and the out_features of each, of linears that read one input.
GROUPS: dict[tuple[int, tuple[int, ...]], str] = {
    (3584, (3584, 512, 512)): "7B q, k and v",
    (3584, (18944, 18944)): "7B gate and up",
    (2048, (2048, 256, 256)): "3B q, k and v",
    (2048, (11008, 11008)): "3B gate and up",
}
TOKENS = (2048, 1, 8192, 16, 256)
SCHEME_NAMES = ("w8a8", "w4a8", "w4a16")
MIXES: dict[str, Optional[float]] = {
    "base": None,
    "quarter vision": 0.25,
    "half vision": 0.5,
    "all vision": 1.0,
}
RANK = 0.05
BF16 = "bf16"
# All linears of a group as one, which is what a dense model can be rewritten to.
BF16_FUSED = "bf16 fused"
TORCHAO = ("torchao SmoothQuant", "torchao int8 dynamic", "torchao int4 weight-only")
# Products alone, of operands that are quantized already: ours are "product w8a8" and so
# on, beside what libraries have.
PRODUCT = "product"
INT8_PRODUCT = f"{PRODUCT} torch._int_mm"
FP8_PRODUCT = f"{PRODUCT} fp8 _scaled_mm"
# Scheme whose work each of them does.
_LIKE = {
    **dict(zip(TORCHAO, ("w8a8", "w8a8", "w4a16"))),
    INT8_PRODUCT: "w8a8",
    FP8_PRODUCT: "w8a8",
}


@dataclass(frozen=True)
class Place:
    """A linear, or several of one input, and a number of tokens.

    Attributes:
        in_features: K.
        out_features: N, of all of them.
        tokens: M.
        parts: the N of each of several linears; empty for one.
    """

    in_features: int
    out_features: int
    tokens: int
    parts: tuple[int, ...] = ()

    @classmethod
    def of_group(cls, in_features: int, parts: tuple[int, ...], tokens: int) -> "Place":
        """Of several linears."""
        return cls(in_features, sum(parts), tokens, parts)

    @property
    def linear(self) -> str:
        """Which linears of which models it is."""
        if self.parts:
            return GROUPS.get((self.in_features, self.parts), "")
        return SHAPES.get((self.in_features, self.out_features), "")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The N of each linear."""
        return self.parts or (self.out_features,)


@dataclass(frozen=True)
class Step:
    """Candidates that are measured in turn at one place.

    Attributes:
        place: where.
        candidates: names: "bf16", "bf16 fused", "w8a8 half vision", "product w8a8",
            or one of a library's.
    """

    place: Place
    candidates: tuple[str, ...]


def plan(
    shapes: Sequence[tuple[int, int]] = tuple(SHAPES),
    tokens: Sequence[int] = TOKENS,
    torchao: bool = True,
    groups: Sequence[tuple[int, tuple[int, ...]]] = tuple(GROUPS),
) -> list[Step]:
    """All steps, the most telling first.

    Args:
        shapes: of linears.
        tokens: numbers of them; the first two are the most telling.
        torchao: with its candidates.
        groups: of linears of one input.
    """
    steps = []
    # The two lengths of the targets with everything, then the others.
    for lengths in (tokens[:2], tokens[2:]):
        places = [Place(*shape, m) for m in lengths for shape in shapes]
        steps += [Step(place, (BF16, *_ours(place, tuple(MIXES)))) for place in places]
        together = [Place.of_group(*group, m) for m in lengths for group in groups]
        mixes = ("base", "half vision")
        steps += [
            Step(place, (BF16, BF16_FUSED, *_ours(place, mixes))) for place in together
        ]
        if torchao:
            beside = (BF16, "w8a8 base", "w4a16 base")
            steps += [Step(place, (*beside, *TORCHAO)) for place in places]
    return steps


def _ours(place: Place, mixes: Sequence[str]) -> list[str]:
    # One token is of one modality.
    possible = [m for m in mixes if not MIXES[m] or MIXES[m] * place.tokens >= 1]
    return [f"{scheme} {mix}" for scheme in SCHEME_NAMES for mix in possible]


def rank_of(in_features: int, out_features: int) -> int:
    """Of the pair of the one modality beside text."""
    return max(1, round(RANK * min(in_features, out_features)))


def card_named(name: str) -> Optional[Device]:
    """The published peaks of a card, as the driver or a user names it.

    None where they are not known.
    """
    return next((d for d in DEVICES if d.name.lower() in name.lower()), None)


def works(place: Place, candidate: str) -> list[Work]:
    """The kernels of a candidate, to take its least time of."""
    calls = paper(place, candidate)
    # The peak of fp8 is that of int8 wherever there is one.
    return (
        [int_linear(call) for call in calls]
        if candidate.startswith(PRODUCT)
        else linears(calls)
    )


def paper(place: Place, candidate: str) -> list[LinearCall]:
    """The linears of a candidate, or those that its products are of."""
    if candidate == BF16_FUSED:
        return [LinearCall(place.tokens, place.in_features, place.out_features)]
    return [_call(place, n, candidate) for n in place.sizes]


def _call(place: Place, out_features: int, candidate: str) -> LinearCall:
    sizes = (place.tokens, place.in_features, out_features)
    if candidate == BF16:
        return LinearCall(*sizes)
    if candidate in _LIKE:
        name, mix = _LIKE[candidate], "base"
    elif candidate.startswith(PRODUCT):
        name, mix = candidate.removeprefix(f"{PRODUCT} "), "base"
    else:
        name, _, mix = candidate.partition(" ")
    scheme, share = SCHEMES[name], MIXES[mix]
    if share is not None:
        share = math.floor(share * place.tokens) / place.tokens
    return LinearCall(
        *sizes,
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        group_size=scheme.group_size,
        share=share,
        rank=rank_of(place.in_features, out_features) if share else 0,
    )
