# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Layers that vLLM merges give what their projections give one by one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.vllm_plugin.shards import QuantizedShards

K, SIZES = 64, (48, 16, 17)
MODALITIES = ("text", "vision", "audio")


def weight(rows: int, seed: int, rank: int, *, factor_seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = torch.Generator().manual_seed(factor_seed)
    factor = torch.rand(3, K, generator=shared) + 0.5
    options = {"weight_bits": 4, "act_bits": 8, "hadamard_size": 32, **options}
    if options["act_bits"] < 16:
        options["act_shift"] = torch.randn(3, K, generator=shared)
    if rank:
        options |= {
            "ranks": (rank, rank + 1),
            "l1": normal(K, 2 * rank + 1),
            "l2": normal(2 * rank + 1, rows),
        }
    return MASQuantTensor.from_hp(
        normal(rows, K),
        modalities=MODALITIES,
        smoothing_factor=factor,
        modality_bias=normal(3, rows),
        **options,
    )


class Calls(TorchDispatchMode):
    """Counts the operators of this package by name."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "masquant":
            name = func._schema.name.partition("::")[2]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


CASES = {
    "without pairs: one weight": (
        [weight(n, i, 0) for i, n in enumerate(SIZES)],
        {"smooth_quantize": 1, "int_linear": 1},
    ),
    "pairs of unequal ranks: smoothed once": (
        [weight(n, i, 1 + i) for i, n in enumerate(SIZES)],
        {"smooth_quantize": 1, "low_rank_down": 3, "int_linear": 3},
    ),
    "factors of their own: smoothed for each": (
        [weight(n, i, 2, factor_seed=i) for i, n in enumerate(SIZES)],
        {"smooth_quantize": 3, "low_rank_down": 3, "int_linear": 3},
    ),
    "weights alone, asymmetric, in groups": (
        [
            weight(n, i, 0, act_bits=16, group_size=32, symmetric=False)
            for i, n in enumerate(SIZES)
        ],
        {"weight_only_linear": 1},
    ),
    "one projection": (
        [weight(33, 0, 2)],
        {"smooth_quantize": 1, "low_rank_down": 1, "int_linear": 1},
    ),
}


@pytest.mark.parametrize("ids", [True, False], ids=["mixed", "base alone"])
@pytest.mark.parametrize("case", CASES)
def test_side_by_side(case, ids):
    weights, counts = CASES[case]
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(7, K, generator=generator)
    bias = torch.randn(sum(w.shape[0] for w in weights), generator=generator)
    known = torch.tensor([0, 1, 2, 2, 0, 1, 0], dtype=torch.int32) if ids else None
    own = bias.split([w.shape[0] for w in weights])
    expected = [torch.ops.masquant.linear(x, w, known, b) for w, b in zip(weights, own)]
    with Calls() as calls:
        found = QuantizedShards(weights)(x, known, bias)
    # The same sums in the same order, whatever stands beside them.
    torch.testing.assert_close(found, torch.cat(expected, -1), rtol=0, atol=0)
    if not ids:
        counts = {n: c for n, c in counts.items() if n != "low_rank_down"}
    assert calls.counts == counts


def test_leading_dimensions_stay():
    shards = QuantizedShards([weight(8, 0, 0)])
    assert shards(torch.randn(2, 3, K), None, None).shape == (2, 3, 8)
