# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Bytes of a quantized weight, to the byte, without making it."""

from dataclasses import dataclass
from typing import Optional

from torchao_masquant.options import Scheme, SolverOptions, resolve_rank

__all__ = ["Compensation", "weight_bytes"]

#: what a part is cut along when a weight is sharded
_ROWS, _COLUMNS, _BOTH, _WHOLE = "rows", "columns", "both", "whole"


@dataclass(frozen=True)
class Compensation:
    """What goes with the integers of a weight.

    Attributes:
        modalities: M, base among them.
        rank: of each pair, see ``resolve_rank``.
        low_rank_bits: 16 or 8, of the pairs.
        shift: whether activations are shifted where they are quantized.
        bias: whether there is a bias per modality.
    """

    modalities: int = 2
    rank: "int | float" = 0.05
    low_rank_bits: int = 16
    shift: bool = True
    bias: bool = True

    @classmethod
    def of(cls, options: SolverOptions, modalities: int) -> "Compensation":
        """What a solution's options ask for, a rank of "auto" taken for its mean.

        Args:
            options: of the solution.
            modalities: that it is for, base among them.
        """
        parts = options.procedure
        return cls(
            modalities=modalities if parts.per_modality else 1,
            rank=options.average_share,
            low_rank_bits=options.low_rank_bits,
            shift=parts.shift,
            bias=parts.centered,
        )


def weight_bytes(
    n: int,
    k: int,
    scheme: Scheme,
    compensation: Compensation,
    *,
    ranks: int = 1,
    sharded: Optional[str] = None,
) -> int:
    """Bytes of all inner tensors of a MASQuantTensor, those of one rank.

    Args:
        n: output channels, of the whole weight.
        k: input channels.
        scheme: integer formats; where the group size does not divide ``k``, quantizing
            raises.
        compensation: what goes with the integers.
        ranks: that share the weight.
        sharded: "rows" or "columns"; None: each rank has all of it.
    """
    groups = 1 if scheme.group_size is None else k // scheme.group_size
    packed = scheme.weight_bits <= 4
    others = compensation.modalities - 1
    rank = resolve_rank(compensation.rank, n, k) * others
    element = 1 if compensation.low_rank_bits == 8 else 2
    vectors = compensation.modalities
    parts = [
        (n * ((k + 1) // 2 if packed else k), _BOTH),
        (4 * n * groups, _BOTH if groups > 1 else _ROWS),
        (4 * vectors * k, _COLUMNS),
        (element * k * rank, _COLUMNS),
        (element * rank * n, _ROWS),
    ]
    if not scheme.symmetric:
        parts.append((n * groups, _BOTH if groups > 1 else _ROWS))
    if compensation.low_rank_bits == 8:
        parts.append((4 * rank, _WHOLE))
    if compensation.bias and others:
        parts.append((4 * vectors * n, _ROWS))
    if compensation.shift and others and not scheme.weight_only:
        parts.append((4 * vectors * k, _COLUMNS))
    return sum(
        size // ranks if along in (sharded, _BOTH) and sharded is not None else size
        for size, along in parts
    )
