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

from torchao_masquant.tensor_subclasses.masquant_tensor import MASQuantTensor

__all__ = ["adopt_rotation"]

# What a part may be filled with where the source has none.
_NOTHING = ("modality_bias", "act_shift")

# What is no tensor, and can't be copied into one.
_ALIKE = (
    "shape",
    "weight_bits",
    "act_bits",
    "modalities",
    "low_rank_bits",
    "hadamard_size",
)

# Parts of the pairs, and the dimension that the components of all modalities lie along.
_PAIR = {"l1": -1, "l2": -2, "low_rank_scale": -1}


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
    for name in target.__tensor_flatten__()[0]:
        theirs = getattr(source, name)
        if name in _PAIR and tuple(target.ranks) != tuple(source.ranks):
            _copy_pair(target, source, name)
        elif theirs is None:
            getattr(target, name).zero_()
        else:
            getattr(target, name).copy_(theirs)
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
    names = (*target.tensor_data_names, *target.optional_tensor_data_names)
    for name in names:
        ours, theirs = getattr(target, name), getattr(source, name)
        if name in _PAIR:
            continue
        if theirs is None and (ours is None or name in _NOTHING):
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
        if name == "act_shift" and theirs.shape == ours.shape[-2:]:
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


def _copy_pair(target: MASQuantTensor, source: MASQuantTensor, name: str) -> None:
    """Copy one side of pairs of a smaller rank; components of zeros change nothing."""
    ours = getattr(target, name)
    ours.zero_()
    theirs = getattr(source, name)
    if theirs is None:
        return
    dim = _PAIR[name]
    start = their_start = 0
    for rank, their_rank in zip(_ranks(target), _ranks(source)):
        ours.narrow(dim, start, their_rank).copy_(
            theirs.narrow(dim, their_start, their_rank)
        )
        start, their_start = start + rank, their_start + their_rank
