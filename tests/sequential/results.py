# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What ``calibrate_sequential`` wrote, and whether it is what another run wrote."""

import json
from pathlib import Path

import torch
from checkpoints import assert_same_recipe, stored
from safetensors import safe_open

from torchao_masquant import Recipe

FIXED = {"alpha": 0.5, "separation": 1.0, "rank": 2, "progress": False}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """The same tensors under the same names, and the same config."""
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    configs = [json.loads((f / "config.json").read_text()) for f in (first, second)]
    assert configs[0] == configs[1]


def assert_same_files(first: Path, second: Path) -> None:
    """Byte for byte; of recipes, whose header has no fixed order, the parts."""
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    for path in first.iterdir():
        other = second / path.name
        if path.is_dir():
            assert_same_files(path, other)
        elif path.name == "recipe.safetensors":
            with safe_open(path, "pt") as a, safe_open(other, "pt") as b:
                assert a.metadata() == b.metadata()
            assert_same_recipe(Recipe.load(path), Recipe.load(other))
        else:
            assert path.read_bytes() == other.read_bytes(), path.name
