# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Names of linears and experts that were saved with another class or transformers."""

from typing import Mapping, Optional, TypeVar

from torch import nn

from torchao_masquant.models.experts import experts_of
from torchao_masquant.models.output_head import head_name
from torchao_masquant.models.parts import decoder_path
from torchao_masquant.models.towers import tower_linears

__all__ = ["named_here"]

_T = TypeVar("_T")


def named_here(model: nn.Module, saved: Mapping[str, _T]) -> dict[str, _T]:
    """What was saved of a model's decoder, head and towers, by the names they have here.

    Where the decoder lies in a model differs between classes, with a head and without,
    and between releases of transformers: that of Qwen2.5-Omni's thinker was ``model``
    up to 5.20, and is ``model.language_model`` since. Inside of it names stay.

    Args:
        model: to be quantized or quantized already; any device.
        saved: by the names of linears, or of parameters that hold experts.

    Returns:
        The same in the same order. A name that is found nowhere stays as it is.
    """
    known = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    known |= experts_of(model).keys()
    path = decoder_path(model)
    here = f"{path}." if path else ""
    inside = {name[len(here) :] for name in known if name.startswith(here)}
    towers = {_beside(path, name): name for name in tower_linears(model)}

    there: Optional[str] = None
    head = head_name(model)
    renamed = {}
    for name, value in saved.items():
        if name not in known and head is not None and _last(name) == _last(head):
            name = head
        if name not in known:
            ends = (name[start:] for start in _starts(name))
            name = next((towers[end] for end in ends if end in towers), name)
        if name not in known:
            if there is None:
                there = _prefix(name, inside)
            if there is not None and name.startswith(there):
                rest = name[len(there) :]
                name = here + rest if rest in inside else name
        renamed[name] = value
    return renamed


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _prefix(name: str, inside: set[str]) -> Optional[str]:
    """What stands before the longest end of a name that is the name of a part."""
    return next(
        (name[:start] for start in _starts(name) if name[start:] in inside), None
    )


def _starts(name: str) -> list[int]:
    """Where ends of a name begin, the longest first."""
    return [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]


def _beside(path: str, name: str) -> str:
    """A name without what it has in common with a path: ``visual.blocks.0.attn.qkv``."""
    parts, others = name.split("."), path.split(".")
    while others and parts[0] == others[0]:
        del parts[0], others[0]
    return ".".join(parts)
