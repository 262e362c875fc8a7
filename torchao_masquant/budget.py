# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``budget="4.5 bits"``: what there is to choose from, as far as shapes tell."""

import dataclasses
import math
from typing import Mapping, Sequence

import torch

from torchao_masquant.option_values import AUTO, bits_of
from torchao_masquant.options import SCHEMES, SolverOptions
from torchao_masquant.tensor_subclasses.weight_layout import WeightLayout, group_count

__all__ = ["budget_bytes", "check_budget", "formats"]

#: Schemes that are chosen from where one of them is asked for. Activations of integers stay
#: as asked for: their bits take no memory, so that any budget would choose the most. Of
#: floats, hardware that multiplies those of 4 bits multiplies the ones of 8 beside them too,
#: and not one of each.
_FAMILIES = (
    ("w8a8", "w4a8"),
    ("w4a16",),
    ("w4a6",),
    ("w4a4",),
    ("fp8", "w4a8-fp8"),
    ("fp8", "nvfp4"),
    ("mxfp8", "mxfp4"),
    ("fp8-block",),
)

#: Group sizes to choose from, beside one scale for each channel. Weights of 8 bits have
#: no others: a step of theirs is fine enough.
_GROUP_SIZES = (128, 64, 32)


def formats(options: SolverOptions, k: int) -> list[SolverOptions]:
    """What an input of K channels may be quantized to, with ranks as they are given.

    Args:
        options: with a budget. A group size that is given is that of all.
        k: K.
    """
    asked = SCHEMES[options.scheme]
    given = None if asked.has_own_groups else options.group_size
    found = []
    for name in _family(options):
        scheme, sizes = SCHEMES[name], [given]
        if scheme.has_own_groups:
            sizes = [None] if k % (scheme.group_size or 1) == 0 else []
        elif given is None and scheme.weight_bits < 8:
            sizes = [size for size in _GROUP_SIZES if k % size == 0]
            if scheme.group_size is None:
                sizes.insert(0, None)
        for size in sizes:
            found.append(
                dataclasses.replace(options, scheme=name, group_size=size, budget=None)
            )
    return found


def _family(options: SolverOptions) -> Sequence[str]:
    return next((f for f in _FAMILIES if options.scheme in f), ())


def check_budget(
    shapes: Mapping[str, tuple[int, int]],
    modalities: int,
    options: SolverOptions,
    *,
    part: str = "",
) -> None:
    """Raise where no choice keeps a budget, or none spends it.

    Args:
        shapes: name to (N, K) of each linear.
        modalities: M.
        options: with a budget.
        part: of the model that the linears are all of, for the message, such as
            " of block 3", where it has to keep the budget by itself; such a part may take
            less.

    Raises:
        ValueError: the budget is below what the smallest choices take, or above what
            the largest take; no group size divides the width of a linear.
    """
    smallest = largest = 0
    for name, (n, k) in shapes.items():
        found = formats(options, k)
        if not found:
            family = [SCHEMES[scheme] for scheme in _family(options)]
            own = {one.group_size or k for one in family if one.has_own_groups}
            raise ValueError(
                f"a budget chooses among groups of {_listed(sorted(own) or _GROUP_SIZES)}, "
                f"and none divides the input width ({k}) of {name}: exclude it."
            )
        smallest += min(_bytes(n, k, modalities, one, least=True) for one in found)
        largest += max(_bytes(n, k, modalities, one, least=False) for one in found)
    weights = sum(n * k for n, k in shapes.values())
    if not weights:
        return
    asked = bits_of(options.budget or "")
    low, high = 8 * smallest / weights, 8 * largest / weights
    if asked < low:
        raise ValueError(
            f"budget={options.budget!r} is too little: with all that goes with their "
            f"codes the linears{part} take {_up(low):g} bits a weight at least."
        )
    if asked > high and not part:
        raise ValueError(
            f"budget={options.budget!r} is more than there is to spend: the linears "
            f"take {math.floor(100 * high) / 100:g} bits a weight at most."
        )


def _bytes(
    n: int, k: int, modalities: int, options: SolverOptions, *, least: bool
) -> int:
    parts, scheme = options.procedure, options.number_format
    share = 0 if least and options.rank == AUTO else options.average_share
    return WeightLayout(
        shape=(n, k),
        weight_bits=scheme.weight_bits,
        groups=group_count(scheme.group_size, k),
        modalities=modalities,
        factors=modalities,
        rank=options.rank_of(share, n, k) * (modalities - 1),
        pair_dtype=torch.int8 if options.low_rank_bits == 8 else torch.bfloat16,
        symmetric=scheme.symmetric,
        bias=parts.centered,
        shift=parts.shift,
        weight_format=scheme.weight_format,
    ).nbytes


def _up(bits: float) -> float:
    """So that the number of a message may be asked for."""
    return math.ceil(100 * bits) / 100


def _listed(sizes: Sequence[int]) -> str:
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last


def budget_bytes(options: SolverOptions, weights: int) -> int:
    """Bytes that linears may take.

    Args:
        options: with a budget.
        weights: how many there are.
    """
    return math.floor(bits_of(options.budget or "") * weights / 8)
