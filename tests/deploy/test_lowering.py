# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Exported programs without any operator of ours that only Python knows."""

from typing import Any, Optional

import pytest
import torch
from torch import nn

from torchao_masquant.deploy import lower
from torchao_masquant.deploy.lowering import choose_kernels
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_engine import CpuEngine
from torchao_masquant.options import SCHEMES
from torchao_masquant.tensor_subclasses import MASQuantTensor

HAVE_KERNELS = cpu_lowering.prepare().engine is not CpuEngine.REFERENCE
KERNELS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not HAVE_KERNELS, reason="no C++ kernels here")
    ),
    "aten",
]


def weight(
    scheme: str, seed: int, low_rank_bits: int = 16, hadamard_size: Optional[int] = None
) -> MASQuantTensor:
    """Of two modalities beside text; the second has no pair."""
    torch.manual_seed(seed)
    bits = SCHEMES[scheme]
    return MASQuantTensor.from_hp(
        torch.randn(24, 64),
        weight_bits=bits.weight_bits,
        act_bits=bits.act_bits,
        group_size=16 if scheme == "w4a16" else None,
        symmetric=bits.symmetric,
        modalities=("text", "vision", "audio"),
        smoothing_factor=torch.linspace(0.5, 2, 3 * 64).reshape(3, 64),
        ranks=(3, 0),
        l1=torch.randn(64, 3),
        l2=torch.randn(3, 24),
        modality_bias=torch.randn(3, 24),
        low_rank_bits=low_rank_bits,
        hadamard_size=hadamard_size,
    )


class Pair(nn.Module):
    """Two linears that smooth one input alike, as q and k do."""

    def __init__(
        self, scheme: str, low_rank_bits: int, hadamard_size: Optional[int] = None
    ):
        super().__init__()
        for name, seed in (("first", 0), ("second", 1)):
            tensor = weight(scheme, seed, low_rank_bits, hadamard_size)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor, ids: Optional[torch.Tensor]) -> torch.Tensor:
        first = torch.ops.masquant.linear(x, self.first, ids)
        shared = None if self.first.act_bits == 16 else self.first
        return first, torch.ops.masquant.linear(x, self.second, ids, None, shared)


def lowered(
    scheme: str,
    mixed: bool,
    kernels: str,
    low_rank_bits: int = 16,
    hadamard_size: Optional[int] = None,
) -> Any:
    model = Pair(scheme, low_rank_bits, hadamard_size)
    length = torch.export.Dim("length", min=2)
    shapes = {"x": {0: length}, "ids": {0: length} if mixed else None}
    ids = torch.arange(9) % 3 if mixed else None
    program = torch.export.export(
        model, (torch.randn(9, 64), ids), dynamic_shapes=shapes
    )
    return model, lower(program, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "base"])
@pytest.mark.parametrize(
    "scheme, low_rank_bits, hadamard_size",
    [("w8a8", 16, None), ("w4a8", 8, 32), ("w4a16", 16, 32)],
)
def test_results_are_those_of_the_model(
    scheme, low_rank_bits, hadamard_size, mixed, kernels
):
    model, program = lowered(scheme, mixed, kernels, low_rank_bits, hadamard_size)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [target for target in called if target.startswith("masquant.")]
    assert any(t.startswith("masquant_cpu.") for t in called) is (kernels == "cpu")
    for length in (9, 2, 31):
        x = torch.randn(length, 64)
        ids = torch.arange(length) % 3 if mixed else None
        with torch.no_grad():
            found, wanted = program.module()(x, ids), model(x, ids)
        for ours, theirs in zip(found, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAVE_KERNELS, reason="no C++ kernels here")
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "base"])
def test_a_shared_input_is_quantized_once(mixed):
    _, program = lowered("w4a8", mixed, "cpu")
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("masquant_cpu.smooth_quantize.default") == 1
    assert names.count("masquant_cpu.int_linear.default") == 2
    assert names.count("masquant_cpu.low_rank_down.default") == 2 * mixed


def test_for_gpus_the_operators_stay():
    """They become Triton kernels where the program is compiled."""
    _, program = lowered("w4a8", True, "triton")
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("masquant.smooth_quantize.default") == 1
    assert names.count("masquant.int_linear.default") == 2


def test_which_kernels(monkeypatch, caplog):
    cpu = torch.device("cpu")
    assert choose_kernels("aten", cpu) == "aten"
    assert choose_kernels("auto", cpu) == ("cpu" if HAVE_KERNELS else "aten")
    with pytest.raises(ValueError, match="choose one of auto, cpu, triton, aten"):
        choose_kernels("vnni", cpu)
    with pytest.raises(ValueError, match="the program is for cpu"):
        choose_kernels("triton", cpu)
    with pytest.raises(ValueError, match="there are none for xpu"):
        choose_kernels("triton", torch.device("xpu"))
    caplog.clear()
    assert choose_kernels("auto", torch.device("xpu")) == "aten"
    assert "slower than our kernels: there are none for xpu" in caplog.text
    with pytest.raises(ValueError, match="the program is for cuda"):
        choose_kernels("cpu", torch.device("cuda"))
    choice = cpu_lowering.EngineChoice(CpuEngine.REFERENCE, "this is aarch64")
    monkeypatch.setattr(cpu_lowering, "prepare", lambda: choice)
    assert choose_kernels("auto", cpu) == "aten"
    with pytest.raises(ValueError, match="cannot be .this is aarch64.: choose 'aten'"):
        choose_kernels("cpu", cpu)
