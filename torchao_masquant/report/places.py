# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where linears stand in a model: the panels and the x axis of figures by layer."""

from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

from torchao_masquant.evaluation.plotting import by_place

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

    @property
    def x_label(self) -> str:
        return "" if self.categories else "decoder layer"

    def place_name(self, place: int) -> str:
        """What stands at a place of the x axis."""
        return self.categories[place] if self.categories else f"layer {place}"


def kinds(names: Iterable[str]) -> list[Kind]:
    """Names of linears by what they are.

    Args:
        names: in the model's order.
    """
    return [_kind(kind, places) for kind, places in by_place(names).items()]


def input_kinds(readers: Mapping[str, Sequence[str]]) -> list[Kind]:
    """Inputs by what they are, named by all linears that read them.

    Args:
        readers: name of the first linear that reads an input to the names of all.
    """
    found = []
    for kind, places in by_place(readers).items():
        parent, _, first = kind.rpartition(".")
        leaves = [name.rpartition(".")[2] for name in readers[places[0][1]]]
        title = ", ".join(leaves) if first in leaves else kind
        found.append(_kind(f"{parent}: {title}" if parent else title, places, kind))
    return found


def _kind(title: str, places: list[tuple[int, str]], key: "str | None" = None) -> Kind:
    if key is None:
        key = title
    if key:
        return Kind(title, tuple(places))
    return Kind("linears", tuple(places), tuple(name for _, name in places))
