# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where linears stand in a model: the panels and the x axis of figures by layer."""

import re
from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

__all__ = ["Kind", "input_kinds", "kinds"]


@dataclass(frozen=True)
class Kind:
    """Linears, or inputs, that do the same in each layer.

    Attributes:
        title: what they are.
        places: (layer, name) pairs.
        categories: names in place of layers, where names have no number.
    """

    title: str
    places: tuple[tuple[int, str], ...]
    categories: tuple[str, ...] = ()

    def place_name(self, place: int) -> str:
        """What stands at a place of the x axis."""
        return self.categories[place] if self.categories else f"layer {place}"


def kinds(names: Iterable[str]) -> list[Kind]:
    """Sort linears by what they are and by their layer.

    What is left of a name behind its layer's number ("self_attn.q_proj") is a kind;
    names without a number are one more.

    Args:
        names: in the model's order.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
        if match is None:
            unnumbered = found.setdefault("", [])
            unnumbered.append((len(unnumbered), name))
        else:
            found.setdefault(match[2], []).append((int(match[1]), name))
    return [
        Kind(title, tuple(places))
        if title
        else Kind("linears", tuple(places), tuple(name for _, name in places))
        for title, places in found.items()
    ]


def input_kinds(readers: Mapping[str, Sequence[str]]) -> list[Kind]:
    """Inputs by what they are, named by all linears that read them.

    Args:
        readers: name of the first linear that reads an input to the names of all.
    """
    found = []
    for kind in kinds(readers):
        parent, _, first = kind.title.rpartition(".")
        leaves = [name.rpartition(".")[2] for name in readers[kind.places[0][1]]]
        title = ", ".join(leaves) if first in leaves else first
        title = f"{parent}: {title}" if parent else title
        found.append(Kind(title, kind.places, kind.categories))
    return found
