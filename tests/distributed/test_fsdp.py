# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""FSDP2 shards the rows of quantized weights and gathers them for each call."""

from typing import Any

import pytest
import torch
from ranks import WORLD
from test_sharded_linear import K, N, make_linear, run, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from torchao_masquant import MASQuantTensor


class Twice(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.first, self.second = make_linear(case), make_linear(case)
        self.second.router = self.first.router
        self.mix = nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.mix(self.first(x)))


def check(rank: int, case: str) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    model = Twice(case)
    calls = [tokens(True), tokens(False), tokens(True)]
    whole = [run(model, *call) for call in calls]
    bytes_of_one = model.first.weight.data.qdata.numel()
    fully_shard(model.first, mesh=mesh)
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for call, expected in zip(calls, whole):
        torch.testing.assert_close(run(model, *call), expected, rtol=0, atol=0)
        weight = model.first.weight
        assert isinstance(weight, DTensor)
        local = weight.to_local()
        assert isinstance(local, MASQuantTensor)
        assert local.shape == (N // WORLD, K)
        storage = local.qdata.untyped_storage().nbytes()
        assert storage == bytes_of_one // WORLD
    model.first.unshard()
    assert isinstance(model.first.weight.data, MASQuantTensor)
    again = make_linear(case).weight.data
    assert torch.equal(model.first.weight.data.dequantize(), again.dequantize())
    model.first.reshard()


@pytest.mark.parametrize("case", ["w8a8", "w4a4, rotated", "w4a16"])
def test_fully_shard(ranks, case):
    ranks.run(check, case)


def refusals(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (WORLD,))
    odd = make_linear("w8a8")
    odd.weight = nn.Parameter(odd.weight[:23], requires_grad=False)
    odd.bias = nn.Parameter(odd.bias[:23])
    messages = []

    def refused(call: Any) -> None:
        with pytest.raises(ValueError) as raised:
            call()
        messages.append(str(raised.value))

    refused(lambda: fully_shard(odd, mesh=mesh))
    by_columns = make_linear("w8a8")
    by_columns.bias = None
    refused(
        lambda: fully_shard(
            by_columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1)
        )
    )
    return messages


def test_refusals(ranks):
    for messages in ranks.run(refusals):
        assert messages == [
            "a MASQuantTensor of shape (23, 32) can't be cut into pieces of 12 along "
            "dimension 0, which do not come out even: shard it over a number of ranks "
            "that divides 23, or keep it whole on each.",
            "fully_shard shards the rows of a quantized weight only, and new_zeros "
            "makes some of them, not (24, 16) of shape (24, 32): leave "
            "shard_placement_fn out, or let it return Shard(0).",
        ]
