# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a quantized weight consists of: one table, with an entry for each part.

Whatever handles parts one by one asks this table: checks, slices, sharding and gathering,
joining, copies, checkpoints, recipes, placeholders and counts of bytes. The shape of a
part is told in symbols, and what happens to a part follows from them: to take rows is to
take along N wherever N occurs, and a part without an N stays whole.

====== ==================================================================================
symbol size
====== ==================================================================================
N      output channels, the rows of a weight
K      input channels, its columns
B      bytes that the integers of a row take
G      groups of neighbouring columns with one scale each; 1: the row has one
M      modalities, base first
F      smoothing factors: M, or 1 where all modalities share one
R      components of the low-rank pairs of all modalities, side by side
====== ==================================================================================

The weights of E experts are one weight, whose parts have a leading dimension E but where
experts share them.
"""

from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Iterator, Mapping, Optional, Sequence, Union

import torch

from torchao_masquant.kernels.number_formats import (
    Grid,
    grid_of,
    number_format,
)

__all__ = [
    "PAIR_DTYPES",
    "PARTS",
    "OfExperts",
    "Part",
    "TensorKind",
    "WeightLayout",
    "group_count",
]

#: Type and shape of a part.
TensorKind = tuple[torch.dtype, tuple[int, ...]]


#: What a low-rank pair may be held in.
PAIR_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
)


class OfExperts(Enum):
    """Whose a part is where a weight is that of several experts."""

    OWN = "each has its own"
    SHARED = "all share one"
    EITHER = "they share one where theirs are equal"


_SHARED, _EITHER = OfExperts.SHARED, OfExperts.EITHER


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight.

    Attributes:
        name: of the tensor's attribute, and in checkpoints.
        dims: a symbol for each dimension of a linear's.
        role: what it is there for, which bytes are told by.
        dtype: its type, or the attribute of :class:`WeightLayout` that tells it.
        when: the attribute of :class:`WeightLayout` that tells whether a weight has it;
            None: every weight has.
        experts: whether they share it, where a weight is that of several.
        neutral: the value that changes nothing, which placeholders are filled with.
        fillable: whether a weight without it is one with neutral values there.
        added: whether it is added to the sum of the products of pieces, so that one piece
            of columns has it, the first, and the others neutral values.
    """

    name: str
    dims: str
    role: str
    dtype: Union[torch.dtype, str] = torch.float32
    when: Optional[str] = None
    experts: OfExperts = OfExperts.OWN
    neutral: float = 0
    fillable: bool = False
    added: bool = False

    @property
    def optional(self) -> bool:
        """Whether there are weights without it."""
        return self.when is not None

    def dim(self, symbol: str) -> Optional[int]:
        """Where a symbol is among its dimensions, from the last, -1; None: nowhere."""
        at = self.dims.find(symbol)
        return None if at < 0 else at - len(self.dims)

    def stacked(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """That of several experts' weight, from theirs.

        Args:
            tensors: one of each expert, all the same where experts share the part.
        """
        first, *others = tensors
        shared = self.experts is OfExperts.SHARED or (
            self.experts is OfExperts.EITHER
            and all(t is first or torch.equal(t, first) for t in others)
        )
        return first if shared else torch.stack(list(tensors))

    def is_of_each_expert(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of this part has a leading dimension of experts."""
        return tensor.dim() > len(self.dims)


#: The parts of a weight by name, in the order of a tensor's arguments.
PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part("qdata", "NB", "integers", "integer_dtype"),
        Part("scale", "NG", "scales", "scale_dtype"),
        Part("act_pre_scale", "FK", "factors", experts=_SHARED, neutral=1),
        Part("l1", "KR", "pairs", "pair_dtype", when="paired", fillable=True),
        Part("l2", "RN", "pairs", "pair_dtype", when="paired", fillable=True),
        Part("modality_bias", "MN", "offsets", when="bias", fillable=True, added=True),
        Part("zero_point", "NG", "scales", torch.int8, when="asymmetric"),
        Part("low_rank_scale", "R", "pairs", when="integer_pair", fillable=True),
        Part(
            "act_shift", "MK", "offsets", when="shift", experts=_EITHER, fillable=True
        ),
        Part("row_scale", "N", "scales", when="two_levels"),
    )
}


@dataclass(frozen=True)
class WeightLayout:
    """Which parts a weight has, and the type and shape of each.

    Attributes:
        shape: (N, K) of the original weight, or (E, N, K) of experts'.
        weight_bits: of a code.
        groups: G.
        modalities: M.
        factors: F.
        rank: R; zero: there are no pairs.
        pair_dtype: of the pairs; with int8 goes a scale of each component.
        symmetric: whether there are no zero points.
        bias: whether there is a bias for each modality.
        shift: whether there is a shift for each modality.
        own_shift: whether each expert has a shift of its own.
        weight_format: a name in :data:`~torchao_masquant.kernels.number_formats.FORMATS`;
            None: integers.
    """

    shape: tuple[int, ...]
    weight_bits: int
    groups: int = 1
    modalities: int = 1
    factors: int = 1
    rank: int = 0
    pair_dtype: torch.dtype = torch.bfloat16
    symmetric: bool = True
    bias: bool = False
    shift: bool = False
    own_shift: bool = False
    weight_format: Optional[str] = None

    @property
    def grid(self) -> Grid:
        """What codes of the weight stand for, and how they are held."""
        return grid_of(self.weight_bits, self.weight_format)

    @property
    def grouped(self) -> bool:
        """Whether scales go with columns; a single one may be that of a whole row."""
        if self.groups > 1:
            return True
        return (
            self.weight_format is not None
            and number_format(self.weight_format).group_size is not None
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Symbol to size."""
        n, k = self.shape[-2:]
        return {
            "N": n,
            "K": k,
            "B": -(-k // self.grid.per_byte),
            "G": self.groups,
            "M": self.modalities,
            "F": self.factors,
            "R": self.rank,
        }

    @property
    def integer_dtype(self) -> torch.dtype:
        """What holds the codes of the weight."""
        return self.grid.dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """What holds the scales of the groups."""
        if self.weight_format is None:
            return torch.float32
        return number_format(self.weight_format).scale_dtype

    @property
    def two_levels(self) -> bool:
        """Whether each row has a scale besides those of its groups."""
        return (
            self.weight_format is not None
            and number_format(self.weight_format).two_levels
        )

    @property
    def asymmetric(self) -> bool:
        """Whether there are zero points."""
        return not self.symmetric

    @property
    def paired(self) -> bool:
        """Whether there are low-rank pairs."""
        return self.rank > 0

    @property
    def integer_pair(self) -> bool:
        """Whether there are low-rank pairs that are quantized, too."""
        return self.paired and self.pair_dtype == torch.int8

    def parts(self) -> Iterator[Part]:
        """Those that a weight of this layout has."""
        for part in PARTS.values():
            if part.when is None or getattr(self, part.when):
                yield part

    def dtype_of(self, part: Part) -> torch.dtype:
        """Of a part, whether or not the weight has it."""
        return getattr(self, part.dtype) if isinstance(part.dtype, str) else part.dtype

    def shape_of(self, part: Part) -> tuple[int, ...]:
        """Of a part, whether or not the weight has it."""
        own = part.experts is OfExperts.OWN or (
            part.experts is OfExperts.EITHER and self.own_shift
        )
        experts = self.shape[:-2] if own else ()
        sizes = self.sizes
        return (*experts, *(sizes[symbol] for symbol in part.dims))

    def kinds(self) -> dict[str, TensorKind]:
        """Name of each part to its type and shape."""
        return {p.name: (self.dtype_of(p), self.shape_of(p)) for p in self.parts()}

    def check_kinds(self, found: Mapping[str, TensorKind]) -> None:
        """Raise unless some parts are those of this layout.

        Args:
            found: name of each part to what it is.

        Raises:
            ValueError: a part is missing, left over, or of the wrong type or shape.
        """
        expected = self.kinds()
        for name in expected:
            if name not in found:
                raise ValueError(f"its {name} is missing")
        for name, (dtype, shape) in found.items():
            if name not in expected:
                raise ValueError(f"its {name} should not be there")
            if expected[name] != (dtype, tuple(shape)):
                raise ValueError(
                    f"its {name} is {dtype} of shape {tuple(shape)}, it should be "
                    f"{expected[name][0]} of shape {expected[name][1]}"
                )

    def bytes_by_role(self) -> dict[str, int]:
        """What each role takes, those that no part is there for among them."""
        found = {part.role: 0 for part in PARTS.values()}
        for name, (dtype, shape) in self.kinds().items():
            found[PARTS[name].role] += dtype.itemsize * prod(shape)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes_by_role().values())

    def neutral(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Parts that stand for a weight of zeros.

        Args:
            device: also "meta".
        """
        return {
            name: torch.full(shape, PARTS[name].neutral, dtype=dtype, device=device)
            for name, (dtype, shape) in self.kinds().items()
        }

    def column_spans(self, start: int, end: int) -> dict[str, tuple[int, int]]:
        """What goes with some columns: symbol to the span along it.

        Args:
            start: a multiple of what a byte and a group hold.
            end: as ``start``, or K.
        """
        k = self.shape[-1]
        per_byte = self.grid.per_byte
        spans = {
            "K": (start, end),
            "B": (start // per_byte, -(-end // per_byte)),
        }
        # A row's scale is that of any columns.
        if self.grouped:
            size = k // self.groups
            spans["G"] = (start // size, end // size)
        return spans

    def piece(self, dim: int, pieces: int) -> "WeightLayout":
        """Of one of several pieces of a linear's weight, of one size.

        Args:
            dim: 0, rows are shared out, or 1, columns.
            pieces: how many.
        """
        n, k = self.shape
        if dim == 0:
            return replace(self, shape=(n // pieces, k))
        groups = max(1, self.groups // pieces)
        return replace(self, shape=(n, k // pieces), groups=groups)


def group_count(group_size: Optional[int], in_features: int) -> int:
    """G of a group size, None for one scale for each output channel."""
    return 1 if group_size is None else in_features // group_size
