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

#: From the ground up. A room is a folder below the package, as it is installed, or a
#: single file of it; "" is the package itself, whose ``__init__`` imports all that users
#: get. A room may import from the layers below its own, and not from its neighbours.
LAYERS: dict[str, set[str]] = {
    "operators on plain tensors": {"kernels"},
    "the quantized weight; and what knows nothing of quantization": {
        "tensor_subclasses",
        *("atomic_files", "freed_memory", "hub", "outputs", "progress"),
        *("reclassing", "testing", "threads"),
    },
    "what is known of models, of inputs and of values": {
        *("models", "statistics", "option_values"),
    },
    "which token is what, and where that is told": {
        *("modality", "option_fields", "routed_modules", "sample_checks"),
    },
    "what is asked for, and for which tokens": {"options", "routing"},
    "what is found, and what a linear computes with it": {
        *("budget", "recipe", "weight_bytes", "linear", "samples", "wording"),
    },
    "experts, which are many linears; blocks, which samples run through": {
        *("expert_modules", "decoder_blocks"),
    },
    "what is quantized": {"selection"},
    "what is rounded without data": {"head_recipe"},
    "three that do not know one another": {"calibration", "solver", "learning"},
    "who knows the three": {"conductor"},
    "in memory, and as torchao does it; what is cached": {
        *("calibrate_in_memory", "conversion", "kv_cache"),
    },
    "a quantized model": {"quantize", "distributed", "gpu_tuning"},
    "as torchao calls it": {"config"},
    "what others call, and what is reckoned": {
        *("integrations", "planning", "data", "figures"),
    },
    "from files to files; how good it is; what leaves": {
        *("sequential", "evaluation", "deploy", "vllm_plugin"),
    },
    "what shows results": {"report", "demo"},
    "all that users get": {""},
    "the command line": {"cli"},
    "the command": {"__main__"},
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


def test_each_room_is_in_one_layer() -> None:
    named = [own for rooms in LAYERS.values() for own in rooms]
    assert sorted(named) == sorted({room(name) for name in modules()})


def test_imports_go_down() -> None:
    height = {own: i for i, rooms in enumerate(LAYERS.values()) for own in rooms}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {found}"
        for name, file in modules().items()
        for line, found in imported(name, file)
        if room(found) != room(name) and height[room(found)] >= height[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


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
