# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A quantized linear on two ranks against the whole one, and against float64."""

from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD
from sharded_oracle import columns_of, expected_sum
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchao_masquant import MASQuantLinear, MASQuantTensor, Router, token_modalities

N, K = 24, 32
NAMES = ("text", "vision", "audio")

CASES: dict[str, dict[str, Any]] = {
    "w8a8": dict(weight_bits=8, act_bits=8),
    "w4a8": dict(weight_bits=4, act_bits=8),
    "w4a4 groups": dict(weight_bits=4, act_bits=4, group_size=16),
    "w8a8, 8-bit pairs": dict(weight_bits=8, act_bits=8, low_rank_bits=8),
    "w4a4, rotated": dict(weight_bits=4, act_bits=4, hadamard_size=8),
    "w4a16": dict(weight_bits=4, act_bits=16, group_size=8, symmetric=False),
}


def make_linear(case: str, dtype: torch.dtype = torch.float32) -> MASQuantLinear:
    """Everything that a quantized linear may have."""
    options = CASES[case]
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    linear.bias.data = torch.randn(N, generator=g).to(dtype)
    weight = MASQuantTensor.from_hp(
        torch.randn(N, K, generator=g).to(dtype),
        modalities=NAMES,
        smoothing_factor=torch.randn(3, K, generator=g).exp(),
        ranks=(3, 2),
        l1=torch.randn(K, 5, generator=g),
        l2=torch.randn(5, N, generator=g),
        modality_bias=torch.randn(3, N, generator=g),
        act_shift=None if options["act_bits"] == 16 else torch.randn(3, K, generator=g),
        **options,
    )
    return MASQuantLinear.from_float(linear, weight, "linear", Router(NAMES))


def tokens(mixed: bool) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, K, generator=g)
    return x, torch.randint(0, 3, (2, 7), generator=g) if mixed else None


def run(module: nn.Module, x: torch.Tensor, ids: Optional[torch.Tensor]) -> Any:
    with torch.no_grad(), token_modalities(module, ids):
        return module(x)


def check_columns(rank: int, case: str, mixed: bool, source: Optional[int]) -> None:
    x, ids = tokens(mixed)
    linear = make_linear(case)
    whole = run(linear, x, ids)
    if source is not None and rank != source:
        # What it has is not what it gets.
        linear.weight.data.qdata.zero_()
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(linear, mesh, ColwiseParallel(), src_data_rank=source)
    assert isinstance(linear.weight, DTensor)
    local = linear.weight.to_local()
    assert isinstance(local, MASQuantTensor) and local.shape == (N // WORLD, K)
    # Its own memory, and no view of the whole.
    whole_bytes = make_linear(case).weight.data.qdata.numel()
    assert local.qdata.untyped_storage().nbytes() == whole_bytes // WORLD
    mine = slice(rank * N // WORLD, (rank + 1) * N // WORLD)
    torch.testing.assert_close(run(linear, x, ids), whole[..., mine], rtol=0, atol=0)


def check_rows(rank: int, case: str, mixed: bool, source: Optional[int]) -> None:
    x, ids = tokens(mixed)
    linear = make_linear(case)
    flat_ids = torch.zeros(14, dtype=torch.int64) if ids is None else ids.reshape(-1)
    y, bound = expected_sum(linear, x.reshape(-1, K), flat_ids, WORLD)
    pieces = x.chunk(WORLD, -1)
    simulated = sum(
        run(columns_of(linear, r, WORLD), piece, ids) for r, piece in enumerate(pieces)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(linear, mesh, RowwiseParallel(), src_data_rank=source)
    assert linear.weight.to_local().shape == (N, K // WORLD)
    result = run(linear, pieces[rank], ids)
    # A sum of two floats does not depend on their order.
    torch.testing.assert_close(result, simulated, rtol=0, atol=0)
    assert ((result.reshape(-1, N) - y).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", [check_columns, check_rows])
def test_sharded_is_whole(ranks, check, case):
    ranks.run(check, case, True, 0)
    ranks.run(check, case, False, None)


class Block(nn.Module):
    def __init__(self, act_bits: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = (make_linear("w4a8") for _ in range(3))
        self.gate.router = self.down.router = self.up.router
        self.down.weight = nn.Parameter(self.down.weight[:, :N], requires_grad=False)
        self.down.in_features = N
        for linear in (self.up, self.gate, self.down):
            linear.weight.act_bits = act_bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)) * self.gate(x))


def check_compiled(rank: int, act_bits: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    block = Block(act_bits)
    parallelize_module(
        block,
        mesh,
        {"up": ColwiseParallel(), "gate": ColwiseParallel(), "down": RowwiseParallel()},
    )
    compiled = torch.compile(block, fullgraph=True)
    for mixed in (True, False):
        x, ids = tokens(mixed)
        eager = run(block, x, ids)
        torch.testing.assert_close(run(compiled, x, ids), eager, rtol=1e-5, atol=1e-5)


# torch keeps graphs on disk: the second one must not be taken for the first.
@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [8, 3])
def test_compiled(ranks, act_bits):
    ranks.run(check_compiled, act_bits)


def cache_keys(rank: int) -> set[str]:
    mesh = init_device_mesh("cpu", (WORLD,))
    keys = set()
    for case in CASES:
        weight = make_linear(case).weight.data
        for piece in (weight[:, :16], weight[:, :16].clone()):
            sharded = DTensor.from_local(piece, mesh, [Shard(1)])
            keys.add(sharded._stable_hash_for_caching())
    return keys


def test_graphs_are_told_apart_by_the_local_weight(ranks):
    for keys in ranks.run(cache_keys):
        assert len(keys) == 2 * len(CASES)


def check_placements(rank: int) -> None:
    """Inputs that are placed in another way are brought to the one that is needed."""
    x, ids = tokens(True)
    mesh = init_device_mesh("cpu", (WORLD,))
    linear = make_linear("w8a8")
    whole = run(linear, x, ids)
    for placement in (Replicate(), Shard(0), Shard(1)):
        linear = make_linear("w8a8")
        linear.weight = nn.Parameter(
            distribute_tensor(linear.weight.data, mesh, [placement]),
            requires_grad=False,
        )
        results = [
            run(linear, given, ids).full_tensor()
            for given in (
                x,
                distribute_tensor(x, mesh, [Replicate()]),
                distribute_tensor(x, mesh, [Shard(0)]),
                distribute_tensor(x, mesh, [Shard(2)]),
            )
        ]
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        if placement != Shard(1):
            torch.testing.assert_close(results[0], whole, rtol=0, atol=0)
    # Whole again, where whole is what it was.
    again = distribute_tensor(make_linear("w4a8").weight.data, mesh, [Replicate()])
    assert torch.equal(
        again.to_local().dequantize(), make_linear("w4a8").weight.data.dequantize()
    )


def test_placements(ranks):
    ranks.run(check_placements)


def refusal(rank: int, shape: tuple[int, int], dim: int, options: Any) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = MASQuantTensor.from_hp(torch.randn(shape), **options)
    try:
        distribute_tensor(weight, mesh, [Shard(dim)])
    except ValueError as error:
        return str(error)
    return "no error"


NOT_SHARDED = [
    (
        ((7, 16), 0, {}),
        "a MASQuantTensor of shape (7, 16) can't be cut into pieces of 4 along "
        "dimension 0, which do not come out even: shard it over a number of ranks "
        "that divides 7, or keep it whole on each.",
    ),
    (
        ((8, 6), 1, {"weight_bits": 4}),
        "columns 0:3 of a MASQuantTensor of shape (8, 6) must start and end on a "
        "multiple of 2 (4-bit integers, group size 6).",
    ),
    (
        ((8, 24), 1, {"group_size": 8}),
        "columns 0:12 of a MASQuantTensor of shape (8, 24) must start and end on a "
        "multiple of 8 (8-bit integers, group size 8).",
    ),
    (
        ((8, 24), 1, {"hadamard_size": 8}),
        "columns 0:12 of a MASQuantTensor of shape (8, 24) must start and end on a "
        "multiple of 8 (8-bit integers, group size 24, rotated in blocks of 8).",
    ),
]


def test_what_cannot_be_sharded(ranks):
    for case, message in NOT_SHARDED:
        assert ranks.run(refusal, *case) == [message] * WORLD


def check_uneven_local(rank: int) -> str:
    """A DTensor made of pieces by hand, whose sizes nobody has checked."""
    mesh = init_device_mesh("cpu", (WORLD,))
    linear = make_linear("w8a8")
    mine = linear.weight.data[:13] if rank == 0 else linear.weight.data[13:]
    weight = DTensor.from_local(
        mine, mesh, [Shard(0)], run_check=False, shape=(25, K), stride=(K, 1)
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    x, ids = tokens(True)
    with pytest.raises(ValueError) as raised:
        run(linear, x, ids)
    dist.barrier()
    return str(raised.value)


def test_uneven_pieces_raise(ranks):
    assert (
        ranks.run(check_uneven_local)
        == [
            "a quantized weight of shape (25, 32) can't be sharded over 2 ranks along "
            "dimension 0: take a number of ranks that divides 25, or keep the weight whole "
            "on each."
        ]
        * WORLD
    )
