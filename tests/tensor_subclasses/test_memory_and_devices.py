# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Memory, devices and new tensors: what torch and others do to any parameter.

Whatever would end the process if it went wrong runs in another one.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from tensor_oracle import assert_same, inner_tensors, make, unrouted
from torch import nn

from torchao_masquant import MASQuantLinear, MASQuantTensor


def layer_of(tensor: MASQuantTensor) -> MASQuantLinear:
    n, k = tensor.shape
    return MASQuantLinear.from_float(nn.Linear(k, n), tensor, "layer", None)


def _read_memory() -> None:
    layer = layer_of(unrouted())
    model, x = nn.Sequential(layer), torch.randn(3, 16)
    before = model(x)
    model.share_memory()
    assert layer.weight.is_shared() and layer.weight.data.is_shared()
    assert layer.weight.share_memory_() is layer.weight
    assert torch.equal(model(x), before)
    storage = layer.weight.untyped_storage()
    assert storage.nbytes() == 6 * 16 and storage.tolist() and bytes(storage)
    assert layer.weight.storage().data_ptr() == layer.weight.qdata.data_ptr()
    assert layer.weight.data_ptr() == layer.weight.qdata.data_ptr()
    storage.share_memory_()
    other = layer.weight.clone()
    other.untyped_storage().fill_(0)
    assert not other.qdata.any() and torch.equal(model(x), before)
    with pytest.raises(BufferError, match="DLPack cannot hand over"):
        torch.from_dlpack(layer.weight)


def _of_another_process(queue: Any, model: nn.Module, x: torch.Tensor) -> None:
    _read_memory()
    assert isinstance(model[0].weight, MASQuantTensor)  # type: ignore[index]
    # Written where the parent sees it.
    with torch.no_grad():
        queue.put(model(x).numpy())
        model[0].weight.scale.mul_(2)  # type: ignore[index]
    queue.close()
    queue.join_thread()


def test_memory_is_shared_with_a_spawned_process_and_read_in_it() -> None:
    """Nothing that reads memory ends the process that does."""
    model = nn.Sequential(layer_of(unrouted())).share_memory()
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = model(x)
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_of_another_process, args=(queue, model, x))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.1)
    assert not queue.empty(), f"the process ended with {process.exitcode}"
    found = queue.get(timeout=300)
    process.join()
    assert process.exitcode == 0
    assert np.array_equal(found, before.numpy())
    doubled = unrouted().scale * 2
    assert torch.equal(model[0].weight.scale, doubled)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scheme": "w4a16", "group_size": 4},
        {"low_rank_bits": 8, "hadamard_size": 8},
    ],
    ids=str,
)
def test_to_meta_and_to_empty(case: dict[str, Any]) -> None:
    tensor = make(**case).tensor
    model = nn.Sequential(nn.Linear(16, 6))
    model[0].weight = nn.Parameter(tensor, requires_grad=False)
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    assert all(t.is_meta for t in inner_tensors(model[0].weight).values())  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    assert model[0].weight.device.type == "cpu"
    model.load_state_dict(state)
    assert_same(model[0].weight.data, tensor)  # type: ignore[arg-type]


def test_empty_like_does_as_it_is_told() -> None:
    tensor = make().tensor
    made = torch.empty_like(tensor, device="meta", dtype=torch.bfloat16)
    assert isinstance(made, MASQuantTensor) and made.is_meta
    assert made.dtype == torch.bfloat16 and made.shape == tensor.shape
    assert made.same_layout(make(dtype=torch.bfloat16).tensor)
    assert torch.empty_like(tensor, requires_grad=True).requires_grad
    with pytest.raises(ValueError, match="stands for a floating point weight, not for"):
        torch.empty_like(tensor, dtype=torch.int8)


def test_values_are_asked_of_plain_tensors() -> None:
    tensor = make(dtype=torch.bfloat16).tensor
    calls: list[tuple[Any, Any]] = [
        (torch.zeros_like, 0.0),
        (torch.ones_like, 1.0),
        (lambda t, **k: torch.full_like(t, 3.0, **k), 3.0),
        (lambda t, **k: t.new_full((6, 16), 2.0, **k), 2.0),
        (lambda t, **k: t.new_ones(6, 16, **k), 1.0),
        (torch.rand_like, None),
        (torch.randn_like, None),
        (lambda t, **k: t.new_empty((6, 16), **k), None),
    ]
    for call, value in calls:
        for options in ({}, {"dtype": torch.float64}, {"device": "meta"}):
            made = call(tensor, **options)
            assert type(made) is torch.Tensor and made.shape == tensor.shape
            assert made.dtype == options.get("dtype", torch.bfloat16)
            assert made.device.type == options.get("device", "cpu")
            if value is not None and not made.is_meta:
                assert (made == value).all()
