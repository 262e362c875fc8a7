# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which room of the package may know of which: imports go one way.

Files are read, not run: an import within a function counts as one at the top, and so does
one for types alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT, installed_path, source_files

PACKAGE = "torchao_masquant"

#: Room to the rooms that it may import from. A room is a folder below the package, as it
#: is installed, or a single file of it; "" is the package itself, whose ``__init__``
#: imports all that users get. Rooms that are not named here may import any.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "tensor_subclasses": {"kernels"},
    # What is asked for, and what is found.
    "option_values": set(),
    "option_fields": {"option_values"},
    "options": {"modality", "option_fields", "option_values"},
    "recipe": {"atomic_files", "kernels", "options", "outputs", "tensor_subclasses"},
    # Calibration, solver and learning do not know one another: the conductor does.
    "statistics": {"threads"},
    "decoder_blocks": {"routing", "samples"},
    "calibration": {
        "decoder_blocks",
        "expert_modules",
        "experts",
        "kernels",
        "model_parts",
        "options",
        "recipe",
        "reclassing",
        "routing",
        "sample_checks",
        "samples",
        "selection",
        "statistics",
        "threads",
        "wrappers",
    },
    "solver": {
        "kernels",
        "option_values",
        "options",
        "progress",
        "recipe",
        "statistics",
        "tensor_subclasses",
        "threads",
    },
    "learning": {
        "decoder_blocks",
        "kernels",
        "options",
        "progress",
        "recipe",
        "routing",
        "tensor_subclasses",
    },
}

#: Functions that import what a string names.
IMPORTERS = ("import_module", "__import__", "import_string")


def modules() -> dict[str, Path]:
    """Dotted name of each module of the package to its file in the checkout."""
    found = {}
    for file in source_files():
        installed = installed_path(file) or ""
        if installed.startswith(f"{PACKAGE}/") and file.endswith(".py"):
            name = installed.removesuffix(".py").replace("/", ".")
            found[name.removesuffix(".__init__")] = ROOT / file
    return found


def room(name: str) -> str:
    """``torchao_masquant.kernels.gpu.smooth`` is of "kernels"."""
    return name.partition(".")[2].partition(".")[0]


def imported(name: str, file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever of the package a module may import."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*parents, *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", None))
            first = node.args[0]
            if called not in IMPORTERS or not isinstance(first, ast.Constant):
                continue
            names = [str(first.value)]
        else:
            continue
        for found in names:
            if found == PACKAGE or found.startswith(f"{PACKAGE}."):
                yield node.lineno, found


def test_rooms_of_the_table_exist() -> None:
    rooms = {room(name) for name in modules()}
    named = set(ALLOWED).union(*ALLOWED.values())
    assert named <= rooms, named - rooms


@pytest.mark.parametrize("own", ALLOWED)
def test_a_room_imports_from_those_below_it_alone(own: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {found}"
        for name, file in modules().items()
        if room(name) == own
        for line, found in imported(name, file)
        if room(found) not in {own, *ALLOWED[own]}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_of_the_table_leads_back_to_itself() -> None:
    for own in ALLOWED:
        seen: set[str] = set()
        ahead = set(ALLOWED[own])
        while ahead:
            seen |= ahead
            ahead = set().union(*(ALLOWED.get(r, set()) for r in ahead)) - seen
        assert own not in seen, own


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torchao_masquant.linear", "torchao_masquant.linear"),
        ("from torchao_masquant import calibrate", "torchao_masquant.calibrate"),
        (
            "def f():\n    from ...recipe import Recipe",
            "torchao_masquant.recipe.Recipe",
        ),
        ("from .. import library", "torchao_masquant.kernels.library"),
        ("from . import smooth", "torchao_masquant.kernels.gpu.smooth"),
        (
            "if TYPE_CHECKING:\n    from torchao_masquant.linear import x",
            "torchao_masquant.linear.x",
        ),
        ("importlib.import_module('torchao_masquant.cli')", "torchao_masquant.cli"),
        ("import torch.nn, torchao_masquant_autoload", None),
    ],
)
def test_every_way_to_import_is_seen(
    source: str, found: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "here.py"
    file.write_text(source)
    seen = [name for _, name in imported("torchao_masquant.kernels.gpu.here", file)]
    assert seen == ([] if found is None else [found])
