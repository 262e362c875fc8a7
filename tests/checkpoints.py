# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a checkpoint holds, and whether two models are the same to the bit."""

import copy
import json
from pathlib import Path
from typing import Any, Union

import torch
from safetensors.torch import load_file
from torch import nn

from torchao_masquant import MASQuantTensor, Recipe

State = Union[nn.Module, dict[str, Any]]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_logits(model: Any, other: Any, inputs: dict[str, Any]) -> None:
    """To the bit, once both have their weights at addresses that are as round.

    transformers maps files to memory; where a plain weight begins at 8 of 64 bytes there,
    the BLAS of stock linears adds in another order.
    """
    expected, found = (logits(copy.deepcopy(m), inputs) for m in (model, other))
    assert torch.equal(found, expected)


def assert_same_state(model: State, other: State) -> None:
    """Every tensor, and every part of a quantized one, to the bit."""
    state, other_state = (
        m.state_dict() if isinstance(m, nn.Module) else m for m in (model, other)
    )
    assert list(state) == list(other_state)
    for name, tensor in state.items():
        found = other_state[name]
        assert type(found) is type(tensor), name
        if not isinstance(tensor, MASQuantTensor):
            assert torch.equal(tensor, found) and tensor.dtype == found.dtype, name
            continue
        names, attributes = tensor.__tensor_flatten__()
        assert found.__tensor_flatten__() == (names, attributes), name
        for part in names:
            a, b = getattr(tensor, part), getattr(found, part)
            assert a.dtype == b.dtype and torch.equal(a, b), (name, part)


def assert_same_recipe(first: Recipe, second: Recipe) -> None:
    """Bit for bit, in the same order."""
    assert first.options == second.options
    assert first.modalities == second.modalities
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        other = second.layers[name]
        assert (layer.shape, layer.fingerprint, layer.ranks) == (
            other.shape,
            other.fingerprint,
            other.ranks,
        )
        tensors = other.tensors()
        assert layer.tensors().keys() == tensors.keys()
        for key, tensor in layer.tensors().items():
            assert tensor.dtype == tensors[key].dtype, (name, key)
            assert torch.equal(tensor, tensors[key]), (name, key)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_files(folder: Path, other: Path) -> None:
    """The same tensors in two folders, to the bit."""
    expected, found = stored(folder), stored(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def entry_of(folder: Path) -> Any:
    """The ``quantization_config`` of a folder's config.json."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
