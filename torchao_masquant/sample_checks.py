# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is wrong with samples that no model can be called with, in one sentence each."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchao_masquant.models.wrappers import is_hooked

__all__ = ["NEEDED", "check_sample", "check_samples", "no_samples"]

#: What calibration says where there are no samples.
NEEDED = "calibration needs at least one sample of every modality"

# Inputs that are tensors of integers (batch, sequence), whatever the model.
_IDS = ("input_ids", "attention_mask", "modality_ids", "mm_token_type_ids")

_PROCESSOR = (
    "make the model's inputs with its processor, as in processor(..., "
    "return_tensors='pt')"
)


def check_samples(samples: Any, what: str = "samples") -> None:
    """Raise unless something can be run through, and is not one sample by itself.

    Args:
        samples: what the caller was given.
        what: it is called in messages.

    Raises:
        TypeError: it is one sample, or nothing that holds samples.
    """
    if isinstance(samples, Mapping):
        raise TypeError(
            f"{what} is one dict (of {_names(samples)}), not a list of samples: put it "
            "in a list, [sample]."
        )
    if isinstance(samples, (str, bytes, torch.Tensor)) or not isinstance(
        samples, Iterable
    ):
        raise TypeError(
            f"{what} is a {type(samples).__name__}, not a list of samples, which are "
            "dicts of the model's keyword inputs."
        )


def no_samples(samples: Any, what: str, needs: str) -> ValueError:
    """What to raise where there was not one.

    Args:
        samples: what the caller was given.
        what: it is called.
        needs: who needs them, and which.
    """
    once = "; an iterator ends after its first run, a list does not"
    return ValueError(
        f"{what} is empty: {needs}{once if isinstance(samples, Iterator) else ''}."
    )


def check_sample(sample: Any, where: str, model: "nn.Module | None" = None) -> None:
    """Raise unless a model can be called with a sample, as far as that can be told.

    Args:
        sample: what should be a dict of keyword inputs.
        where: "sample 3", for messages.
        model: to be called; None where its device does not matter.

    Raises:
        TypeError: it is no dict, or holds what a processor has not been at yet.
        ValueError: a tensor has no batch dimension, or one too many, or is on another
            device than the model.
    """
    if not isinstance(sample, Mapping):
        raise TypeError(
            f"{where} is a {type(sample).__name__}, not a dict of the model's keyword "
            "inputs."
        )
    for name in _IDS:
        if sample.get(name) is not None:
            _check_ids(sample[name], name, where)
    takes = inspect.signature(model.forward).parameters if model is not None else {}
    for name, value in sample.items():
        kind = _raw(value)
        if kind is not None and name not in takes:
            raise TypeError(
                f"{where} holds {kind} under {name!r}, so that it is a row of a data "
                f"set and not what a model is called with: {_PROCESSOR}."
            )
    # accelerate's hooks move the inputs to where they are needed.
    if model is None or is_hooked(model):
        return
    devices = {p.device for p in model.parameters()}
    for name, value in sample.items():
        if isinstance(value, torch.Tensor) and value.device not in devices:
            raise ValueError(
                f"{name} of {where} is on {value.device}, the model on "
                f"{', '.join(sorted(map(str, devices)))}: move the sample there."
            )


def _check_ids(value: Any, name: str, where: str) -> None:
    if isinstance(value, Mapping):
        # One mask for each kind of layer.
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} of {where} is a {type(value).__name__}, not a tensor: {_PROCESSOR}."
        )
    if name == "attention_mask":
        # Additive ones have four dimensions, and are of floats.
        fits = value.dim() in (2, 4)
    elif value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} of {where} is of {value.dtype}, and ids are integers.")
    else:
        # Ids that are given are of the shape that a linear's tokens have, which may be
        # without a batch in a module that is no language model.
        fits = value.dim() == 2 or name == "modality_ids"
    if fits:
        return
    way = (
        "add the batch with [None]"
        if value.dim() == 1
        else "a DataLoader's default collate_fn stacks samples that have a batch "
        "already: give it collate_fn=lambda rows: rows[0] with batch_size=1"
    )
    raise ValueError(
        f"{name} of {where} is of shape {tuple(value.shape)}, not (batch, sequence): "
        f"{way}."
    )


def _raw(value: Any) -> "str | None":
    """What a value is that no model computes with."""
    if isinstance(value, (list, tuple)) and value:
        inner = _raw(value[0])
        return None if inner is None else f"a list with {inner}"
    if isinstance(value, (str, bytes)):
        return "text" if isinstance(value, str) else "bytes"
    # PIL's images, without importing it.
    if any(base.__module__.startswith("PIL.") for base in type(value).__mro__):
        return "an image"
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return "a numpy array"
    return None


def _names(sample: Mapping) -> str:
    names = [str(name) for name in sample]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "nothing"
