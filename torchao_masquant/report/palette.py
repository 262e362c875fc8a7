# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Colours in light and in dark mode, and which of them stands for what."""

from typing import Sequence

from torchao_masquant.evaluation.plotting import style_of
from torchao_masquant.report.chart import Look

__all__ = [
    "INK",
    "MUTED",
    "PARTS",
    "colors",
    "method_look",
    "method_order",
    "modality_look",
]

INK, MUTED = "ink", "muted"

# Names of chart colours to (light, dark). Parts of the memory: one hue that gets
# lighter, which are never mistaken for a modality.
_FIXED = {
    INK: ("#23211d", "#f0eee9"),
    MUTED: ("#8b867c", "#8f8b83"),
    "part0": ("#4a4458", "#b9b0d0"),
    "part1": ("#7a7190", "#91879f"),
    "part2": ("#a89fc0", "#6f667f"),
    "part3": ("#c9762f", "#e8a05f"),
    "part4": ("#e2b98c", "#a9763f"),
}
PARTS = ("part0", "part1", "part2", "part3", "part4")

# Okabe and Ito's colours are made for white paper: on black, lighter ones of their hue.
_ON_DARK = {
    "#0072B2": "#5ab2ef",
    "#D55E00": "#ff9152",
    "#009E73": "#3ecba0",
    "#CC79A7": "#e6a0c7",
    "#E69F00": "#f3bf4d",
    "#56B4E9": "#9fd3f5",
    "#000000": "#ffffff",
}

_METHODS = {
    "masquant": Look(INK, "o", "solid", 2.25),
    "masquant-paper": Look(MUTED, "^", "dashed"),
    "smoothquant": Look(MUTED, "s", "dashdot"),
    "rtn": Look(MUTED, "X", "dotted"),
}
_OTHER_MARKERS = ("D", "v", "P")


def colors(modalities: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name of every colour that a page may use to its (light, dark) value.

    Args:
        modalities: all that occur in the page.
    """
    found = dict(_FIXED)
    for modality in modalities:
        light = style_of(modality, modalities).color
        found[modality_look(modality, modalities).color] = (light, _ON_DARK[light])
    return found


def modality_look(
    modality: str, modalities: Sequence[str], dash: str = "solid"
) -> Look:
    """The look of a modality: the same in every figure, as in the other figures."""
    style = style_of(modality, modalities)
    # By the colour: a name from a file is no name for CSS.
    return Look(f"m{list(_ON_DARK).index(style.color)}", style.marker, dash)


def method_look(method: str, methods: Sequence[str]) -> Look:
    """The look of a method: ours in ink, what it is compared with in grey.

    Args:
        method: whose.
        methods: all that occur, for the markers of those unknown here.
    """
    if method in _METHODS:
        return _METHODS[method]
    unknown = [m for m in methods if m not in _METHODS]
    place = unknown.index(method) if method in unknown else 0
    return Look(MUTED, _OTHER_MARKERS[place % len(_OTHER_MARKERS)], "dashed")


def method_order(method: str) -> tuple[int, str]:
    """Key to sort methods by: what ours is compared with first, unknown ones last."""
    known = list(reversed(_METHODS))
    return (known.index(method) if method in known else len(known), method)
