# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The one style sheet: colours in light and in dark mode, and what each stands for."""

import importlib
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

__all__ = [
    "COLORS",
    "GUIDE",
    "INK",
    "MUTED",
    "PAPER",
    "PARTS",
    "PLAIN",
    "VARIABLES",
    "method_look",
    "method_order",
    "modality_color",
    "modality_look",
    "require",
    "styled",
]

#: Name of each colour to its (light, dark) value. Figures are drawn in the light ones,
#: which are all different; a page has the dark ones in dark mode. Modalities have Okabe
#: and Ito's, which the colour-blind tell apart, and on black lighter ones of their hue.
#: Parts of the memory are never mistaken for a modality.
COLORS = {
    "card": ("#ffffff", "#1e1e21"),
    "grid": ("#ece9e2", "#2b2b2f"),
    "ink": ("#23211d", "#f0eee9"),
    "soft": ("#6a655b", "#a19c93"),
    "muted": ("#8b867c", "#8f8b83"),
    "part0": ("#4a4458", "#b9b0d0"),
    "part1": ("#7a7190", "#91879f"),
    "part2": ("#a89fc0", "#6f667f"),
    "part3": ("#c9762f", "#e8a05f"),
    "part4": ("#e2b98c", "#a9763f"),
    "m0": ("#0072b2", "#5ab2ef"),
    "m1": ("#d55e00", "#ff9152"),
    "m2": ("#009e73", "#3ecba0"),
    "m3": ("#cc79a7", "#e6a0c7"),
    "m4": ("#e69f00", "#f3bf4d"),
    "m5": ("#56b4e9", "#9fd3f5"),
    "m6": ("#000000", "#ffffff"),
}
_LIGHT = {name: light for name, (light, _) in COLORS.items()}

#: light value to the variable of a page that has it, or the dark one
VARIABLES = {light: f"var(--{name})" for name, light in _LIGHT.items()}

PAPER, INK, MUTED, _SOFT = (_LIGHT[n] for n in ("card", "ink", "muted", "soft"))
PARTS = tuple(_LIGHT[f"part{place}"] for place in range(5))

#: of a line that others are compared with
GUIDE: dict[str, Any] = {"color": MUTED, "linestyle": "--", "linewidth": 1.0}
#: of a line that a solid one of the same colour improves on
PLAIN: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none"}

_MODALITIES = tuple(_LIGHT[f"m{place}"] for place in range(7))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FIRST = ("text", "vision", "audio")

# Ours in ink, what it is compared with in grey.
_METHODS: dict[str, dict[str, Any]] = {
    "masquant": {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 2.0},
    "masquant-paper": {"color": MUTED, "marker": "^", "linestyle": "--"},
    "smoothquant": {"color": MUTED, "marker": "s", "linestyle": "-."},
    "rtn": {"color": MUTED, "marker": "X", "linestyle": ":"},
}
_OTHER_MARKERS = ("D", "v", "P", "*", "<", ">", "h", "p")

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "figure.titlesize": 11,
    "font.size": 8,
    "grid.color": _LIGHT["grid"],
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    # Text stays text, in the font of the page, and can be searched.
    "svg.fonttype": "none",
    "text.color": INK,
    # A "$" in a name begins no formula.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": _SOFT,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": _SOFT,
    "ytick.major.size": 0,
}


def require(*modules: str) -> None:
    """Raise one sentence where a library that figures or reports need is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"figures and reports need {module}: "
                "pip install 'torchao_masquant[report]'."
            ) from error


@contextmanager
def styled() -> Iterator[None]:
    """Draw, or write, in our style, whatever the user's own settings are.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib")
    from matplotlib import style

    with style.context(_RC, after_reset=True):
        yield


def _place(modality: str, modalities: Sequence[str]) -> int:
    known = [*_FIRST, *(m for m in modalities if m not in _FIRST)]
    return known.index(modality)


def modality_color(modality: str, modalities: Sequence[str]) -> str:
    """The colour of a modality: the same for text, vision and audio in every model.

    Args:
        modality: whose.
        modalities: all that occur, for the colours of others.
    """
    return _MODALITIES[_place(modality, modalities) % len(_MODALITIES)]


def modality_look(modality: str, modalities: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a modality: a colour and a marker of its own."""
    marker = _MARKERS[_place(modality, modalities) % len(_MARKERS)]
    return {"color": modality_color(modality, modalities), "marker": marker}


def method_look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a method.

    Args:
        method: whose.
        methods: all that occur, for the markers of those unknown here.
    """
    if method in _METHODS:
        return _METHODS[method]
    unknown = [m for m in methods if m not in _METHODS]
    marker = _OTHER_MARKERS[unknown.index(method) % len(_OTHER_MARKERS)]
    return {"color": MUTED, "marker": marker, "linestyle": "--"}


def method_order(method: str) -> tuple[int, str]:
    """Key to sort methods by: what ours is compared with first, unknown ones last."""
    known = list(reversed(_METHODS))
    return (known.index(method) if method in known else len(known), method)
