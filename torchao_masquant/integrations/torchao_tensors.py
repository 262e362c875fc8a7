# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Weights that torchao's own configs have quantized, in a checkpoint beside ours.

They are taken apart and put together by torchao's safetensors support, which knows each of
its classes; what it says of one, an entry, is kept in ``config.json`` as text: of a type in
a nested dict, transformers would cut the name.
"""

import json
from typing import Any, Mapping

import torch

__all__ = ["assembled", "check_entry", "is_torchao", "parts_of", "taken_apart"]

_OURS = "MASQuantTensor"


def is_torchao(tensor: Any) -> bool:
    """Whether a tensor is of a class that torchao can take apart, and not ours."""
    return type(tensor).__name__ in _classes()


def taken_apart(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """Plain tensors, and what they are.

    Args:
        name: of the parameter in the model.
        tensor: that :func:`is_torchao`.

    Returns:
        Stored name to part, sharing memory with none; the entry, JSON.
    """
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
    )

    parts, entries = flatten_tensor_state_dict({name: tensor.detach()})
    return parts, entries[name]


def assembled(name: str, parts: Mapping[str, torch.Tensor], entry: str) -> torch.Tensor:
    """The tensor of its parts; the reverse of :func:`taken_apart`."""
    from torchao.prototype.safetensors.safetensors_support import (
        unflatten_tensor_state_dict,
    )

    entries = {name: entry, "tensor_names": json.dumps([name])}
    found, _ = unflatten_tensor_state_dict(dict(parts), entries)
    return found[name]


def parts_of(entry: str) -> list[str]:
    """Names of the parts of a tensor."""
    return json.loads(entry)["_tensor_data_names"]


def check_entry(name: str, entry: Any) -> str:
    """An entry that was read.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(entry)
        kind, attributes = found["_type"], found["_data"]
        parts = found["_tensor_data_names"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} is said to be {entry!r}") from error
    if not isinstance(kind, str) or kind not in _classes():
        raise ValueError(f"{name} is a {kind}, which is no tensor of this torchao")
    if not isinstance(attributes, dict) or not (
        isinstance(parts, list)
        and parts
        and all(isinstance(part, str) and part.isidentifier() for part in parts)
    ):
        raise ValueError(f"{name} is a {kind} of {parts!r}")
    return entry


def _classes() -> set[str]:
    from torchao.prototype.safetensors.safetensors_utils import (
        ALLOWED_TENSORS_SUBCLASSES,
    )

    return set(ALLOWED_TENSORS_SUBCLASSES) - {_OURS}
