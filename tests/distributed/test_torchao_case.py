# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""torchao's own test case for tensor parallelism, on ours.

It is ``TorchAOTensorParallelTestCase.test_tp`` from its source, with this replaced:

- "cuda" by "cpu", as its device;
- its processes, one for each GPU, by the two of this folder;
- ``quantize``: a model with neither a config nor samples is quantized by rounding to
  nearest, which ``quantize_`` does after a call of it.

Its way to shard (slices, ``DTensor.from_local``), its models, its inputs and what it
does with them, compiled too, stay.
"""

import inspect
import textwrap
from typing import Any

import pytest
import torch
import torchao.testing.utils as torchao_cases
from ranks import WORLD
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantTensor


def torchao_case() -> Any:
    """Not by its name in this module, where pytest would collect it."""
    return torchao_cases.TorchAOTensorParallelTestCase


_REPLACED = {
    '    device = "cuda"\n': '    device = "cpu"\n',
    'device="cuda"\n': 'device="cpu"\n',
    'torch.device(f"cuda:{self.rank % torch.cuda.device_count()}")': (
        'torch.device("cpu")'
    ),
    'mesh.device_type = "cuda"\n': "pass\n",
}


def cpu_case() -> Any:
    """torchao's test as a function for a CPU."""
    source = inspect.getsource(torchao_case())
    source = textwrap.dedent(source[source.index("    def test_tp(") :])
    for old, new in _REPLACED.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    assert "cuda" not in source
    scope = dict(vars(torchao_cases))
    exec(source, scope)
    return scope["test_tp"]


class _Case:
    """What torchao's test wants of its class."""

    colwise_shard = staticmethod(torchao_case().colwise_shard)
    rowwise_shard = staticmethod(torchao_case().rowwise_shard)

    def __init__(self, rank: int, scheme: str):
        self.rank = rank
        self.scheme = scheme

    def build_device_mesh(self) -> Any:
        return init_device_mesh("cpu", (WORLD,))

    def quantize(self, m: nn.Module) -> nn.Module:
        options = dict(scheme=self.scheme, method="rtn")
        quantize_(m, MASQuantConfig(step="prepare", **options))
        with torch.no_grad():
            m(torch.randn(4, m.linear.in_features).to(m.linear.weight.dtype))
        quantize_(m, MASQuantConfig(step="convert", **options))
        assert isinstance(m.linear.weight.data, MASQuantTensor)
        return m


def check(rank: int, scheme: str, dtype: torch.dtype) -> None:
    cpu_case()(_Case(rank, scheme), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, dtype", zip(("w8a8", "w4a8", "w4a8"), torchao_case().COMMON_DTYPES)
)
def test_tp(ranks, scheme, dtype):
    ranks.run(check, scheme, dtype)


def check_results(rank: int) -> None:
    """torchao's case runs, and looks at no number: these are them."""
    case = _Case(rank, "w4a8")

    class M(nn.Module):
        def __init__(self, k: int, n: int) -> None:
            super().__init__()
            self.linear = nn.Linear(k, n, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    torch.manual_seed(5)
    up, down = case.quantize(M(64, 128)), case.quantize(M(128, 64))
    x = 100 * torch.randn(16, 64)
    with torch.no_grad():
        whole_up = up(x)
        whole = down(whole_up)
    mesh = case.build_device_mesh()
    up, down = case.colwise_shard(up, mesh), case.rowwise_shard(down, mesh)
    y_up = up(DTensor.from_local(x, mesh, [Replicate()]))
    y = down(y_up)
    torch.testing.assert_close(y_up.full_tensor(), whole_up, rtol=0, atol=0)
    # A step of a token is 1 / 127 of its largest value; two roundings of 128 values.
    step = whole_up.abs().amax(-1, keepdim=True) / 127
    assert ((y.full_tensor() - whole).abs() < 3 * step).all()


def test_its_results(ranks):
    ranks.run(check_results)
