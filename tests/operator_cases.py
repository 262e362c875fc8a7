# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The calls that every implementation of the operators is held to: one named list.

A case is a quantized linear and the tokens that it meets. It says which operators it
tells something about; their operands are made from it here, and the whole linear's.
"""

import functools
import zlib
from dataclasses import dataclass
from typing import Any, Callable, Optional

import numpy as np
import torch
from operator_oracle import (
    ids_for,
    int_linear_f64,
    low_rank_down_f64,
    own_columns,
    packed,
    smooth_quantize_f64,
    weight_only_linear_f64,
)

from torchao_masquant.tensor_subclasses import MASQuantTensor

QUANTIZE, DOWN = "smooth_quantize", "low_rank_down"
PRODUCT, WEIGHT_ONLY = "int_linear", "weight_only_linear"
OPERATORS = (QUANTIZE, DOWN, PRODUCT, WEIGHT_ONLY)
PAIRS = (DOWN, PRODUCT, WEIGHT_ONLY)
WEIGHTS = (PRODUCT, WEIGHT_ONLY)
TOKENS = (QUANTIZE, WEIGHT_ONLY)

ORACLES: dict[str, Callable[..., Any]] = {
    DOWN: low_rank_down_f64,
    PRODUCT: int_linear_f64,
    WEIGHT_ONLY: weight_only_linear_f64,
}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT8 = torch.int8


@dataclass(frozen=True)
class Case:
    """A linear of N by K, the pairs of its modalities, and T tokens.

    Attributes:
        id: its name in a test's.
        about: what it is about.
        operators: those that it is telling for.
        groups: scales of an output channel.
        zero_point: of weights whose activations are not quantized.
        ranks: of the pairs of the modalities but the base.
        pair: type of both sides of them.
        dtype: of tokens, bias and result.
        ids: a name of MIXES.
        shift: its size; 0 for none.
        layout: a name of LAYOUTS, of all operands.
        values: a name of VALUES, of the tokens.
        ties: share of the levels that float32 can't tell from a rounding boundary.
    """

    id: str
    about: str
    operators: tuple[str, ...] = OPERATORS
    tokens: int = 21
    in_features: int = 48
    out_features: int = 13
    weight_bits: int = 8
    act_bits: int = 8
    groups: int = 1
    zero_point: bool = True
    ranks: tuple[int, ...] = (2, 3)
    pair: torch.dtype = BF16
    dtype: torch.dtype = FP32
    ids: str = "shuffled"
    ids_dtype: torch.dtype = torch.int64
    shift: float = 0.0
    bias: bool = True
    modality_bias: bool = True
    hadamard_size: int = 1
    layout: str = "contiguous"
    values: str = "normal"
    ties: float = 0.01

    def __str__(self) -> str:
        return self.id


CASES = (
    Case("plain", "The call that all others differ from in one thing."),
    # Sizes.
    Case("no-tokens", "A batch may be empty.", tokens=0),
    Case("one-token", "Decoding: K is split, weights are read as stored.", tokens=1),
    Case(
        "smallest",
        "One token, one channel, one output.",
        (QUANTIZE, PRODUCT, WEIGHT_ONLY),
        **dict(tokens=1, in_features=1, out_features=1, ids="none", ties=1.0),
    ),
    Case(
        "one-channel",
        "torch._int_mm gives no product of these.",
        **dict(tokens=20, in_features=1, out_features=16, ties=1.0),
    ),
    Case(
        "odd-sizes",
        "Nothing is a multiple of anything, and half a byte is left over.",
        **dict(tokens=7, in_features=33, out_features=5, weight_bits=4),
    ),
    Case(
        "sixteen-tokens",
        "The most that meet the weights as they are stored on a CPU.",
        WEIGHTS,
        **dict(tokens=16, in_features=129, out_features=65, weight_bits=4),
    ),
    Case(
        "seventeen-tokens",
        "The fewest that share panels of weights, or are smoothed ahead of a product.",
        WEIGHTS,
        **dict(tokens=17, in_features=127, out_features=130, weight_bits=4),
    ),
    Case(
        "beyond-tiles",
        "Several tiles of tokens, of channels and of outputs, and a rest of each.",
        **dict(tokens=70, in_features=131, out_features=67),
    ),
    Case(
        "long-rows",
        "Rows longer than a block: a maximum of several, a sum in several shares.",
        **dict(tokens=3, in_features=600, out_features=9),
    ),
    # Modalities.
    Case(
        "no-ids",
        "A call of base tokens alone: no pair is met.",
        (QUANTIZE, PRODUCT, WEIGHT_ONLY),
        ids="none",
    ),
    Case(
        "all-base",
        "A mixed call that turns out to be of base tokens.",
        PAIRS,
        ids="base",
    ),
    Case("all-of-one", "Every token is of the last modality.", PAIRS, ids="last"),
    Case("lone-token", "One token of another modality among base tokens.", ids="lone"),
    Case("absent-modality", "A modality has no token.", PAIRS, ids="absent"),
    Case(
        "spans",
        "Spans of modalities that end inside of tiles.",
        **dict(tokens=37, ids="spans", ranks=(18, 20)),
    ),
    Case("int32-ids", "Ids of 32 bits.", (QUANTIZE, DOWN), ids_dtype=torch.int32),
    Case("uint8-ids", "Ids of 8 bits.", WEIGHTS, ids_dtype=torch.uint8),
    Case(
        "one-modality",
        "Two modalities in all, one pair.",
        (DOWN, WEIGHT_ONLY),
        ranks=(3,),
    ),
    Case(
        "unequal-ranks",
        "A modality in the middle has no pair.",
        (DOWN, WEIGHT_ONLY),
        ranks=(1, 0, 6),
    ),
    Case("rank-zero", "Pairs without a column.", PAIRS, ranks=(0, 0)),
    Case(
        "wide-ranks",
        "Columns of each modality in tiles of their own, and a tile with two of them.",
        PAIRS,
        **dict(tokens=26, ranks=(20, 5, 17)),
    ),
    Case(
        "many-modalities",
        "More than one launch tells apart.",
        (QUANTIZE, DOWN, WEIGHT_ONLY),
        **dict(tokens=26, ranks=(1, 0, 2, 3, 0, 1, 17, 2, 1, 0, 0, 3)),
    ),
    Case("fp16-pair", "A pair in float16.", PAIRS, pair=FP16),
    Case("fp32-pair", "A pair in float32, which nothing rounds.", PAIRS, pair=FP32),
    Case("int8-pair", "A pair of 8 bits, with a scale a component.", PAIRS, pair=INT8),
    # Types.
    Case("bfloat16", "Tokens and result of bfloat16.", dtype=BF16),
    Case("float16", "Tokens and result of float16.", dtype=FP16, pair=FP16),
    Case("float64", "Tokens and result of float64.", (QUANTIZE, PRODUCT), dtype=FP64),
    # Weights.
    Case("w4", "Two weights a byte.", WEIGHTS, weight_bits=4),
    Case("w3", "Weights of 3 bits, held in 4.", WEIGHTS, weight_bits=3),
    Case("w6", "Weights of 6 bits, held in 8.", (PRODUCT,), weight_bits=6),
    Case("groups", "Four scales a channel.", WEIGHTS, groups=4),
    Case(
        "w4-groups",
        "A scale for each 32 weights of 4 bits, in bfloat16.",
        WEIGHTS,
        **dict(in_features=128, weight_bits=4, groups=4, dtype=BF16),
    ),
    Case(
        "odd-groups",
        "Groups of 3 begin in the middle of a byte.",
        WEIGHTS,
        **dict(in_features=60, weight_bits=4, groups=20),
    ),
    Case(
        "wide-groups",
        "Groups of 150 end in the middle of a block of K.",
        WEIGHTS,
        **dict(tokens=5, in_features=300, weight_bits=4, groups=2),
    ),
    Case(
        "groups-of-one-token",
        "Decoding with packed groups: looked up as stored.",
        WEIGHTS,
        **dict(tokens=1, in_features=256, out_features=66, weight_bits=4, groups=2),
    ),
    Case(
        "symmetric",
        "Weights without a zero point.",
        (WEIGHT_ONLY,),
        **dict(weight_bits=4, zero_point=False),
    ),
    Case("no-bias", "A linear without a bias.", WEIGHTS, bias=False),
    Case(
        "no-modality-bias",
        "No modality adds anything of its own.",
        WEIGHTS,
        modality_bias=False,
    ),
    # Activations.
    *(
        Case(f"a{bits}", f"Activations of {bits} bits.", (QUANTIZE,), act_bits=bits)
        for bits in (6, 4)
    ),
    Case("a2", "Three levels.", (QUANTIZE,), act_bits=2, ties=1.0),
    Case("shift", "Each modality's shift is taken off.", (QUANTIZE,), shift=1.0),
    Case(
        "shift-of-base",
        "Without ids it is the base's, in bfloat16.",
        (QUANTIZE,),
        **dict(shift=1.0, ids="none", dtype=BF16),
    ),
    Case(
        "large-shift",
        "Where x p - o cancels, a product that is not rounded shows.",
        (QUANTIZE,),
        **dict(in_features=130, shift=1e4, ties=1.0, values="around the shift"),
    ),
    Case(
        "zero-channel", "A channel that no token uses.", TOKENS, values="zero channel"
    ),
    Case("zero-token", "A token of zeros has no scale.", TOKENS, values="zero token"),
    Case("sink", "A token a thousand times louder than others.", values="sink"),
    Case(
        "outlier",
        "A channel of ten thousand leaves nothing of the others.",
        TOKENS,
        values="outlier",
    ),
    Case(
        "subnormals",
        "Below float32's normal range a scale stops shrinking.",
        (QUANTIZE,),
        values="subnormal token",
    ),
    # Rotations.
    *(
        Case(
            f"rotation-{size}",
            about,
            TOKENS,
            **dict(in_features=width, hadamard_size=size, shift=1.0, dtype=dtype),
        )
        for size, width, dtype, about in (
            (2, 70, FP32, "Neighbours inside of a vector are rotated."),
            (16, 48, FP16, "A whole vector."),
            (64, 192, BF16, "Blocks of several vectors; the last tile is not full."),
            (512, 512, FP32, "The whole row is one block."),
        )
    ),
    # Layouts.
    Case("transposed", "Columns lie in a row in memory.", layout="transposed"),
    Case("spread", "Elements are not neighbours in memory.", layout="spread"),
    Case("wider", "Rows are parts of wider ones.", groups=2, layout="wider"),
)
BY_ID = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES)


def _last(t: torch.Tensor, m: int) -> torch.Tensor:
    return torch.full_like(t, m - 1)


# Of the tokens' places and the number of modalities.
MIXES: dict[str, Callable[[torch.Tensor, int], Optional[torch.Tensor]]] = {
    "none": lambda t, m: None,
    "shuffled": lambda t, m: ids_for(len(t), modalities=m),
    "base": lambda t, m: torch.zeros_like(t),
    "last": _last,
    "lone": lambda t, m: (t == len(t) // 2).long() * (m - 1),
    "absent": lambda t, m: (t % 2) * (m - 1),
    "spans": lambda t, m: (t // 11) % m,
}

# Rows apart from each other, elements apart from each other.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "spread": lambda t: torch.stack((t, torch.full_like(t, 9)), -1)[..., 0],
    "wider": lambda t: (
        torch.cat((t, torch.full_like(t, 9)), -1)[..., : t.shape[-1]]
        if t.dim() == 2
        else t
    ),
}


class Operands:
    """What a case's call is made of."""

    def __init__(self, case: Case, seed: Optional[int] = None):
        self.case = case
        seed = zlib.crc32(case.id.encode()) if seed is None else seed
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        def uniform(*size: int) -> torch.Tensor:
            return torch.rand(*size, generator=generator)

        def integers(least: int, most: int, *size: int) -> torch.Tensor:
            return torch.randint(least, most, size, generator=generator, dtype=INT8)

        t, k, n = case.tokens, case.in_features, case.out_features
        m, rank = len(case.ranks) + 1, sum(case.ranks)
        limit = 2 ** (case.weight_bits - 1)
        self.pre_scale = normal(m, k).exp()
        self.shift = case.shift * normal(m, k) if case.shift else None
        ids = MIXES[case.ids](torch.arange(t), m)
        self.ids = None if ids is None else ids.to(case.ids_dtype)
        self.weight = integers(-limit, limit, n, k)
        # The nibble behind an odd row is not read: it is not zero.
        self.qdata = packed(self.weight.numpy(), case.weight_bits, -3)
        self.scale = uniform(n, case.groups) / 2**case.weight_bits + 1e-3
        self.zero_point = integers(-limit, limit, n, case.groups)
        self.low_rank_scale = None
        if case.pair == INT8:
            self.l1, self.l2 = (
                integers(-127, 127, k, rank),
                integers(-127, 127, rank, n),
            )
            self.low_rank_scale = uniform(rank) / 127**2 + 1e-6
        else:
            self.l1, self.l2 = (
                normal(*size).to(case.pair) for size in ((k, rank), (rank, n))
            )
        self.bias = normal(n).to(case.dtype) if case.bias else None
        self.modality_bias = normal(m, n) if case.modality_bias else None
        self.x = self._tokens(normal(t, k)).to(case.dtype)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        values = self.case.values
        if values == "zero channel":
            x[:, 3] = 0
        elif values == "zero token":
            x[2] = 0
        elif values == "sink":
            x[0] *= 1000
        elif values == "outlier":
            x[:, 17] = 1e4
        elif values == "subnormal token":
            x[2] = 1e-40
        elif values == "around the shift":
            assert self.shift is not None and self.ids is not None
            x = (x + self.shift[self.ids]) / self.pre_scale[self.ids]
        else:
            assert values == "normal"
        return x

    def named(self, operator: str, **other: Any) -> dict[str, Any]:
        """Arguments of one operator, in its order; ``other`` in place of some."""
        whole = {**getattr(self, f"_{operator}")(), **other}
        spread = LAYOUTS[self.case.layout]
        return {
            name: spread(a) if isinstance(a, torch.Tensor) else a
            for name, a in whole.items()
        }

    def args(self, operator: str, **other: Any) -> tuple[Any, ...]:
        return tuple(self.named(operator, **other).values())

    def _smooth_quantize(self) -> dict[str, Any]:
        return dict(
            x=self.x,
            act_pre_scale=self.pre_scale,
            modality_ids=self.ids,
            act_bits=self.case.act_bits,
            act_shift=self.shift,
            hadamard_size=self.case.hadamard_size,
        )

    @functools.cached_property
    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By the oracle, whatever an implementation makes of them."""
        found = smooth_quantize_f64(*self._smooth_quantize().values())
        q = torch.from_numpy(np.round(found.levels).astype(np.int8))
        return q, torch.from_numpy(found.scale).float()

    def _low_rank_down(self) -> dict[str, Any]:
        q, scale = self.quantized
        return dict(
            qdata=q,
            scale=scale,
            l1=self.l1,
            modality_ids=self.ids,
            ranks=self.case.ranks,
            low_rank_scale=self.low_rank_scale,
        )

    def _int_linear(self) -> dict[str, Any]:
        q, scale = self.quantized
        hidden = None
        if self.ids is not None:
            found = low_rank_down_f64(*self._low_rank_down().values())
            hidden = torch.from_numpy(found.value).float()
        return dict(
            qx=q,
            x_scale=scale,
            qdata=self.qdata,
            scale=self.scale,
            low_rank_hidden=hidden,
            l2=None if hidden is None else self.l2,
            modality_bias=self.modality_bias,
            modality_ids=self.ids,
            bias=self.bias,
            weight_bits=self.case.weight_bits,
            out_dtype=self.case.dtype,
        )

    def _weight_only_linear(self) -> dict[str, Any]:
        return dict(
            x=self.x,
            act_pre_scale=self.pre_scale,
            qdata=self.qdata,
            scale=self.scale,
            zero_point=self.zero_point if self.case.zero_point else None,
            l1=self.l1,
            l2=self.l2,
            modality_bias=self.modality_bias,
            modality_ids=self.ids,
            bias=self.bias,
            ranks=self.case.ranks,
            weight_bits=self.case.weight_bits,
            out_dtype=self.case.dtype,
            low_rank_scale=self.low_rank_scale,
            hadamard_size=self.case.hadamard_size,
        )

    def own(self) -> np.ndarray:
        """(T, R) whether a column belongs to the token's modality."""
        return own_columns(self.ids, self.case.ranks, self.case.tokens)

    def tensor(self, act_bits: int) -> MASQuantTensor:
        """The weight; ``act_bits`` of 16: activations are not quantized."""
        case = self.case
        weight_only = act_bits == 16
        factors = 1 if self.low_rank_scale is None else self.low_rank_scale
        return MASQuantTensor.from_integers(
            self.weight,
            self.scale,
            zero_point=self.zero_point if weight_only and case.zero_point else None,
            weight_bits=case.weight_bits,
            act_bits=act_bits,
            modalities=[f"modality {m}" for m in range(len(case.ranks) + 1)],
            smoothing_factor=self.pre_scale.reciprocal(),
            dtype=case.dtype,
            ranks=case.ranks,
            l1=self.l1.float() * factors if sum(case.ranks) else None,
            l2=self.l2.float() if sum(case.ranks) else None,
            modality_bias=self.modality_bias,
            act_shift=None if weight_only else self.shift,
            low_rank_bits=8 if case.pair == INT8 else 16,
            hadamard_size=case.hadamard_size if case.hadamard_size > 1 else None,
        )


@functools.lru_cache(maxsize=None)
def operands(id: str) -> Operands:
    """Of a case of the list; not to be written to."""
    return Operands(BY_ID[id])
