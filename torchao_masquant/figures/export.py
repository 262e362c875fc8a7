# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures as elements of a page, and as PNG, for slides and papers."""

import io
import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchao_masquant.atomic_files import replacing
from torchao_masquant.figures.drawing import Drawing
from torchao_masquant.figures.style import VARIABLES, styled
from torchao_masquant.figures.ticks import plain

__all__ = ["to_svg", "write_png"]

# As what it is known again; see torchao_masquant.outputs.
_PNG_METADATA = {"Software": "torchao_masquant"}

_COORDINATES = ("d", "x", "y", "width", "height", "transform")
# The page has a font of its own.
_NEEDLESS = re.compile(
    "(font-family: [^;]*|stroke-linejoin: miter|stroke-dashoffset: 0)(; )?"
)
_COLOR = re.compile("#[0-9a-f]{6}")


def write_png(drawing: Drawing, path: Path) -> None:
    """Write a figure on white, with its title; a file of that name is replaced whole.

    Raises:
        OSError: the file cannot be written.
    """
    canvas = drawing.titled()
    with styled(), replacing(path) as temporary:
        canvas.savefig(temporary, format="png", metadata=_PNG_METADATA)


def to_svg(drawing: Drawing) -> str:
    """A figure as an ``<svg>`` of an HTML page, without its title.

    Colours are variables of the page (:data:`~torchao_masquant.figures.style.COLORS`),
    ids are those of no other figure of another name, and what a mark says when it is
    pointed at is its ``<title>``. The same figure gives the same text.
    """
    hinted: dict[str, list[str]] = {}
    for panel in drawing.panels:
        for artist, hints in panel.hints:
            gid = f"hints-{len(hinted)}"
            artist.set_gid(gid)
            hinted[gid] = [plain(hint) for hint in hints]
    file = io.StringIO()
    with styled(), warnings.catch_warnings():
        # The page's font has what ours may lack.
        warnings.filterwarnings("ignore", "Glyph")
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": drawing.name}):
            drawing.canvas.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    _add_hints(root, hinted)
    _clean(root)
    root.set("role", "img")
    root.set("aria-label", plain(drawing.description))
    return ElementTree.tostring(root, encoding="unicode")


def _add_hints(root: Any, hinted: dict[str, list[str]]) -> None:
    for group in root.iter():
        hints = hinted.get(group.get("id", ""), [])
        # A line's markers, or the outline of one bar.
        marks = [e for e in group.iter() if e.tag.endswith("}use")] or list(group)
        for mark, hint in zip(marks, hints, strict=True) if hints else ():
            ElementTree.SubElement(mark, "title").text = hint


def _clean(root: Any) -> None:
    """Leave out what a page does not need, and what would reach beyond the figure."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", _attributes(root)))
    for element in root.iter():
        # Inside of HTML, elements and attributes need no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name == "id" and value not in used:
                continue
            if name in _COORDINATES:
                value = _short(value)
            elif name == "style":
                value = _NEEDLESS.sub("", value)
                value = _COLOR.sub(lambda m: VARIABLES.get(m[0], m[0]), value)
            if not value.startswith("rotate(-0 "):
                element.set(name.rpartition("}")[2], value)
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    for element in reversed(list(root.iter())):
        _unwrap(element)
        _share_style(element)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)


def _short(coordinates: str) -> str:
    """With a tenth of a point, and small outlines with a hundredth."""
    found = re.sub(r"(\d\d\.\d|\.\d\d)\d+", r"\1", coordinates)
    return re.sub(r"\s*([A-Zz])\s*", r"\1", found)


def _attributes(root: Any) -> str:
    return " ".join(value for e in root.iter() for value in e.attrib.values())


def _unwrap(parent: Any) -> None:
    """Leave out groups of nothing and of one, which say nothing of it."""
    parent[:] = [
        child[0] if len(child) == 1 and child.tag == "g" and not child.attrib else child
        for child in parent
        if len(child) or child.tag not in ("g", "defs")
    ]


def _share_style(group: Any) -> None:
    """What all marks of a line look like is said once."""
    styles = {child.get("style") for child in group}
    marks = all(child.tag == "use" for child in group)
    if len(group) > 1 and marks and len(styles) == 1 and "style" not in group.attrib:
        group.set("style", styles.pop() or "")
        for child in group:
            child.attrib.pop("style", None)
