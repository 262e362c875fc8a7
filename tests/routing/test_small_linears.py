# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Linears that quantizing would not make smaller are left out unless they are named."""

import logging

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import MASQuantConfig, MASQuantLinear, calibrate, masquant_config
from torchao_masquant.calibration.request import base_first
from torchao_masquant.options import SolverOptions
from torchao_masquant.selection import select


class Gated(nn.Module):
    """A layer, a router of 4 rows and a gate of one, as mixtures of experts have."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, dtype=dtype)
        self.router = nn.Linear(width, 4, bias=False, dtype=dtype)
        self.gate = nn.Linear(width, 1, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return self.layer(x) * self.gate(x).sigmoid() + weights.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "method, scheme", [("masquant", "w4a8"), ("smoothquant", "w8a8"), ("rtn", "w8a8")]
)
def test_a_gate_and_a_router_are_left_out(method, scheme, caplog):
    model = Gated(256, torch.bfloat16)
    options = SolverOptions(scheme=scheme, method=method)
    with caplog.at_level(logging.WARNING):
        found = select(model, options=options, modalities=3).linears
    assert list(found) == ["layer"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "left out 2 linears that quantizing would not make smaller, router (4 x 256) "
        "the first: include takes them all the same."
    )


def test_one_that_is_named_is_taken():
    found = select(
        Gated(256), include=["gate", "layer"], options=SolverOptions(), modalities=3
    ).linears
    assert list(found) == ["layer", "gate"]


def test_what_counts_is_what_is_stored():
    """The sizes on both sides of the limit, against the quantized weight itself."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(1, 30, 64, generator=generator), "modality_ids": ids}
        for ids in (torch.arange(30)[None] % 3,) * 2
    ]
    for rows in range(1, 24):
        model = nn.Sequential(nn.Linear(64, rows, bias=False, dtype=torch.float32))
        model.forward = lambda x, model=model: model[0](x)
        recipe = calibrate(
            model, data, scheme="w8a8", include="0", alpha=0.5, separation=1.0,
            rounding="nearest", clip=False, modalities=("text", "vision", "audio"),
            progress=False,
        )  # fmt: skip
        taken = select(
            nn.Sequential(model[0], nn.Linear(512, 512)),
            options=SolverOptions(scheme="w8a8"),
            modalities=3,
        ).linears
        dense = model[0].weight.nbytes
        quantize_(model, masquant_config(recipe))
        assert ("0" in taken) == (model[0].weight.nbytes_stored < dense), rows


def test_a_large_rank_that_was_asked_for_leaves_nothing_out():
    model = tiny_models.qwen25_vl(layers=1)
    options = SolverOptions(rank=1.0)
    assert len(base_first(model, "text", None)) == 2
    assert len(select(model, options=options, modalities=2).linears) == 7


def test_a_toy_is_taken_whole(caplog):
    """Where the small ones are much of the model, it is a trial and not to be shrunk."""
    for others in ((), (nn.Linear(64, 2),)):
        model = nn.Sequential(nn.Linear(64, 1), *others)
        found = select(model, options=SolverOptions(), modalities=2).linears
        assert len(found) == len(model)
    assert not caplog.records


def test_torchaos_steps_leave_them_out_too():
    model = Gated(64)
    quantize_(model, MASQuantConfig(step="prepare", method="smoothquant"))
    model(torch.randn(1, 8, 64))
    quantize_(model, MASQuantConfig(step="convert", method="smoothquant"))
    assert {n: type(m) for n, m in model.named_children()} == {
        "layer": MASQuantLinear,
        "router": MASQuantLinear,
        "gate": nn.Linear,
    }
    empty = Gated(64)
    quantize_(empty, MASQuantConfig(step="prepare_for_loading", method="smoothquant"))
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(1, 8, 64)
    assert torch.equal(empty(x), model(x))


def test_a_router_of_a_class_of_its_own_is_left_out(caplog):
    """Llama 4's is a linear by class, and gives scores."""
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_local_experts=2, interleave_moe_layer_step=1,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        names = list(select(model).linears)
    assert names and not any(name.endswith("router") for name in names)
    messages = [record.getMessage() for record in caplog.records]
    assert any("left out 2 linears of a class" in m and "Router" in m for m in messages)
    with pytest.raises(ValueError, match="router is a Llama4Router, not a plain"):
        select(model, include="*.router")
