# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a wheel and a source archive hold, and what an import finds."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from checkout import FOLDERS, PACKAGES, PYPROJECT, ROOT, installed_path, source_files

import torchao_masquant


@pytest.fixture(scope="module")
def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel_files):
    expected = {installed_path(file) for file in source_files()} - {None}
    expected.add("torchao_masquant_autoload.py")
    found = {file for file in wheel_files if ".dist-info/" not in file}
    assert found == expected


def test_the_wheel_holds_the_small_model(wheel_files):
    data = "torchao_masquant/testing/digits/data"
    for variant in ("plain", "outliers"):
        assert f"{data}/{variant}/model.safetensors" in wheel_files


def test_the_wheel_installs_top_level_names_of_its_own(wheel_files):
    # A bare `kernels` would shadow Hugging Face's package of that name. The module beside
    # the package is what torch imports without importing the package.
    top = {PurePosixPath(file).parts[0] for file in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "torchao_masquant",
        "torchao_masquant_autoload.py",
    }


def test_the_wheel_holds_the_licence_and_the_notice(wheel_files):
    names = {PurePosixPath(f).name for f in wheel_files if ".dist-info/licenses/" in f}
    assert names == {"LICENSE", "NOTICE"}


def test_every_package_folder_is_listed():
    folders = {
        PurePosixPath(installed).parent
        for file in source_files()
        if file.endswith(".py") and (installed := installed_path(file)) is not None
    }
    assert {".".join(folder.parts) for folder in folders} == set(PACKAGES)


def test_every_package_folder_has_an_init():
    for package in PACKAGES:
        path = package.replace(".", "/") + "/__init__.py"
        assert any(installed_path(file) == path for file in source_files()), package


_PACKAGE_FILES = f"""
import importlib, importlib.util, json
kernels = importlib.util.find_spec("kernels")
files = [importlib.import_module(package).__file__ for package in {PACKAGES!r}]
print(json.dumps([kernels and kernels.origin, files]))
"""


def test_imports_from_inside_and_outside_of_the_checkout_find_the_same(tmp_path):
    inside = [importlib.import_module(package).__file__ for package in PACKAGES]
    result = subprocess.run(
        [sys.executable, "-c", _PACKAGE_FILES],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
        capture_output=True,
        text=True,
    )
    bare_kernels, outside = json.loads(result.stdout.splitlines()[-1])
    assert inside == outside
    folders = {package: folder for folder, package in FOLDERS.items()}
    for package, file in zip(PACKAGES, inside):
        # The longest mapped prefix says where the package lies.
        prefix = max((p for p in folders if f"{package}.".startswith(p + ".")), key=len)
        rest = package[len(prefix) :].replace(".", "/")
        assert Path(file) == ROOT / f"{folders[prefix]}{rest}/__init__.py"
    assert bare_kernels is None or ROOT not in Path(bare_kernels).parents


def _names(requirements: list[str]) -> set[str]:
    """Distributions of some requirements, as importlib.metadata spells them."""
    found = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", m.group()).lower() for m in found if m is not None}


_DEPENDENCIES = _names(PYPROJECT["project"]["dependencies"])
_EXTRAS = PYPROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", sorted(_DEPENDENCIES | _names(_EXTRAS["dev"])))
def test_every_dependency_is_installed_and_imports(name):
    modules = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if name in _names(distributions)
        and module.isidentifier()
        and not module.startswith("_")
    ]
    assert modules
    for module in modules:
        # Compiled by mypyc, beside the package, under a name of digits.
        if "__mypyc" not in module:
            importlib.import_module(module)


def _imports(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that are imported as the file is."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        # Inside of a function: imported where it is called, so it may be an extra's.
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        found |= _imports(node)
    return found


def test_everything_that_the_package_imports_is_declared():
    modules = importlib.metadata.packages_distributions()
    own = {"torchao_masquant", *sys.stdlib_module_names}
    for file in source_files():
        if not file.endswith(".py") or installed_path(file) is None:
            continue
        # Torch's builds for GPUs bring Triton along; elsewhere it is an extra's. vLLM
        # is whatever build of it runs the plugin.
        extra = {"triton"} if file.startswith("kernels/gpu/") else set()
        extra |= {"vllm"} if "/vllm_plugin/" in file else set()
        for module in _imports(ast.parse((ROOT / file).read_text())) - own - extra:
            assert _names(modules.get(module, [])) & _DEPENDENCIES, (file, module)


def test_every_public_name_is_there():
    for name in torchao_masquant.__all__:
        assert getattr(torchao_masquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'save_quantised'"):
        torchao_masquant.save_quantised  # noqa: B018


def test_every_extra_that_the_readme_names_exists():
    pages = [f for f in source_files() if f.endswith(".md")]
    named = {
        e for f in pages for e in re.findall(r"\.\[(\w+)\]", (ROOT / f).read_text())
    }
    assert named <= set(_EXTRAS)
