# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Of the code that a benchmark's rows come from."""

import hashlib
from pathlib import Path
from typing import Iterable

import torchao_masquant
from torchao_masquant import kernels, tensor_subclasses

__all__ = ["code_fingerprint"]

_CODE = (".py", ".cpp", ".h", ".cu")
# Of the package, what quantizes nothing.
_OTHERWISE = ("report", "cli", "planning", "demo", "deploy", "data")


def code_fingerprint(*more: Path) -> str:
    """Twelve digits that change with the package or the baselines.

    Args:
        more: folders and files that belong to the benchmark itself.
    """
    # In a checkout the last two lie beside the package, not in it.
    modules = (torchao_masquant, kernels, tensor_subclasses)
    roots = [Path(module.__path__[0]) for module in modules]
    digest = hashlib.sha256()
    for root in (*roots, Path(__file__).parent, *more):
        for path in _code(root):
            inner = path.relative_to(root.parent)
            if len(inner.parts) < 2 or inner.parts[1] not in _OTHERWISE:
                digest.update(f"{inner}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _code(root: Path) -> Iterable[Path]:
    found = sorted(root.rglob("*")) if root.is_dir() else [root]
    return [path for path in found if path.suffix in _CODE]
