# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A model with quantized layers that are frozen, trained by several processes."""

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchao_masquant import MASQuantLinear, MASQuantTensor


def quantized() -> MASQuantLinear:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    tensor = MASQuantTensor.from_hp(weight)
    return MASQuantLinear.from_float(nn.Linear(16, 6), tensor, "layer", None)


class Trained(nn.Module):
    """A quantized layer that is frozen, beside one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = quantized().requires_grad_(False)
        self.other = quantized().requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(x) + self.other(x))


def train(rank: int) -> None:
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    for group, size in ((None, WORLD), (alone, 1)):
        torch.manual_seed(0)
        model = Trained()
        for broken in (model, nn.Sequential(quantized())):
            with pytest.raises(ValueError, match="give it init_sync=False"):
                DistributedDataParallel(broken, process_group=group)
        parallel = DistributedDataParallel(model, init_sync=False, process_group=group)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
        parallel(x).sum().backward()
        gradients = [torch.zeros(2, 6) for _ in range(size)]
        dist.all_gather(gradients, model.head.weight.grad, group=group)
        assert all(torch.equal(g, gradients[0]) for g in gradients)
        assert gradients[0].any()


def test_distributed_data_parallel(ranks: Ranks) -> None:
    ranks.run(train)
