# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Bytes of a quantized weight, to the byte, without making it."""

from dataclasses import dataclass
from typing import Optional

import torch

from torchao_masquant.options import Scheme, SolverOptions, resolve_rank
from torchao_masquant.tensor_subclasses.weight_layout import WeightLayout, group_count

__all__ = ["Compensation", "weight_bytes"]


@dataclass(frozen=True)
class Compensation:
    """What goes with the integers of a weight.

    Attributes:
        modalities: M, base among them.
        rank: of each pair, see ``resolve_rank``.
        low_rank_bits: 16 or 8, of the pairs.
        shift: whether activations are shifted where they are quantized.
        bias: whether there is a bias per modality, also of the only one.
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
            modalities=modalities if parts.tells_apart else 1,
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
    others = compensation.modalities - 1
    layout = WeightLayout(
        shape=(n, k),
        weight_bits=scheme.weight_bits,
        groups=group_count(scheme.group_size, k),
        modalities=compensation.modalities,
        factors=compensation.modalities,
        rank=resolve_rank(compensation.rank, n, k) * others,
        pair_dtype=torch.int8 if compensation.low_rank_bits == 8 else torch.bfloat16,
        symmetric=scheme.symmetric,
        bias=compensation.bias,
        shift=compensation.shift and not scheme.weight_only,
        weight_format=scheme.weight_format,
    )
    if sharded is not None:
        layout = layout.piece(("rows", "columns").index(sharded), ranks)
    return layout.nbytes
