# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``copy_``: the values of one quantized weight into the memory of another.

Types and devices of the parts may differ, and so may the type that the weights stand for.
A target with more parts than the source (a placeholder with pairs, for a weight without)
is filled with what changes nothing.
"""

from typing import Any, Optional

import torch

from torchao_masquant.tensor_subclasses.low_rank_pair import copy_components
from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS, OfExperts

__all__ = ["adopt_rotation"]

# What is no tensor, and can't be copied into one.
_ALIKE = (
    "shape",
    "weight_bits",
    "act_bits",
    "modalities",
    "low_rank_bits",
    "hadamard_size",
    "weight_format",
    "act_format",
)


@MASQuantTensor.implements(torch.ops.aten.copy_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    target, source = args[:2]
    if not all(isinstance(t, MASQuantTensor) for t in (target, source)):
        raise ValueError(
            "copy_ needs two MASQuantTensors of one layout: got a "
            f"{type(source).__name__} for a {type(target).__name__}."
        )
    problem = _mismatch(target, source)
    if problem is not None:
        raise ValueError(
            f"copy_ needs two MASQuantTensors of one layout, and {problem}: got "
            f"{source!r} for {target!r}."
        )
    for name, ours in target.parts().items():
        theirs = getattr(source, name)
        components = PARTS[name].dim("R")
        if theirs is None:
            ours.fill_(PARTS[name].neutral)
        elif components is not None and target.ranks != source.ranks:
            ours.zero_()
            copy_components(ours, target.ranks, theirs, source.ranks, components)
        else:
            ours.copy_(theirs)
    return target


def _mismatch(target: MASQuantTensor, source: MASQuantTensor) -> Optional[str]:
    """What of a source has no room in a target."""
    for name in _ALIKE:
        ours, theirs = getattr(target, name), getattr(source, name)
        # The bits of a pair matter where there is one.
        if name == "low_rank_bits" and source.l1 is None and target.l1 is not None:
            ours = theirs = None
        if ours != theirs:
            return f"the source's {name} is {theirs}, the target's {ours}"
    ours, theirs = _ranks(target), _ranks(source)
    if any(a < b for a, b in zip(ours, theirs)):
        return f"the source's ranks are {theirs}, the target's {ours}"
    for name, part in PARTS.items():
        ours, theirs = getattr(target, name), getattr(source, name)
        # Ranks and bits have told that there is room for the pairs.
        if part.dim("R") is not None:
            continue
        if theirs is None and (ours is None or part.fillable):
            continue
        if ours is None:
            return f"the target has no {name}"
        if theirs is None:
            return f"the source has no {name}"
        if ours.is_floating_point() != theirs.is_floating_point():
            return f"the source's {name} is {theirs.dtype}, the target's {ours.dtype}"
        # One smoothing factor for all modalities is one for each.
        if name == "act_pre_scale" and theirs.shape == (1, *ours.shape[1:]):
            continue
        # As is a shift that experts share.
        if part.experts is OfExperts.EITHER and theirs.shape == ours.shape[-2:]:
            continue
        if ours.shape != theirs.shape:
            return (
                f"the source's {name} is of shape {tuple(theirs.shape)}, the target's "
                f"of shape {tuple(ours.shape)}"
            )
    return None


def adopt_rotation(target: Any, source: Any) -> None:
    """Let a weight that is about to be filled stand for integers of another rotation.

    A rotation takes no memory, so that a placeholder has room for any. It is no matter of
    ``copy_``, which may be called on one of several tensors of the same memory.

    Args:
        target: the parameter itself; where all else of the source has no room in it, or
            one of both is no such weight, it stays as it is.
        source: what it is to be filled with.
    """
    if not (isinstance(target, MASQuantTensor) and isinstance(source, MASQuantTensor)):
        return
    before, target.hadamard_size = target.hadamard_size, source.hadamard_size
    if _mismatch(target, source) is not None:
        target.hadamard_size = before


def _ranks(tensor: MASQuantTensor) -> tuple[int, ...]:
    """Of every modality but the base, zero where there is no pair."""
    return tuple(tensor.ranks) or (0,) * (len(tensor.modalities) - 1)
