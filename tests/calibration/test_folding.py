# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Where a smoothing factor can go, and that it changes nothing there."""

import pytest
import torch
import transformers
from tiny_models import qwen25_vl, recipe_of
from torch import nn

from torchao_masquant import calibrate
from torchao_masquant.models.folding import find_folds, folded_norm
from torchao_masquant.selection import select

_SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_INNER = {"v_proj": ("o_proj",), "up_proj": ("down_proj",)}
#: name of a class to the last names of what takes factors, and of their readers
_FAMILIES = {
    "Llama": {
        "input_layernorm": _QKV,
        "post_attention_layernorm": _GATE_UP,
        **_INNER,
    },
    # Its norm has the name of Llama's, and comes after attention.
    "Gemma2": {
        "input_layernorm": _QKV,
        "pre_feedforward_layernorm": _GATE_UP,
        **_INNER,
    },
    # All its norms come behind what they are named for.
    "Olmo2": _INNER,
    # A layer norm with a bias; between fc1 and fc2 there is a ReLU.
    "OPT": {
        "self_attn_layer_norm": _QKV,
        "final_layer_norm": ("fc1",),
        "v_proj": ("out_proj",),
    },
    # Attention and MLP read one norm.
    "Cohere": {"input_layernorm": (*_QKV, *_GATE_UP), **_INNER},
}


def model_of(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**_SIZES, ffn_dim=96)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def call(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(_FAMILIES))
def test_what_takes_factors(family, dtype):
    model = model_of(family).to(dtype)
    found = {
        fold.source.rpartition(".")[2]: tuple(
            n.rpartition(".")[2] for n in fold.readers
        )
        for fold in find_folds(model, select(model).linears, lambda: call(model))
    }
    assert found == _FAMILIES[family]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", list(_FAMILIES))
@torch.no_grad()
def test_folded_factors_change_nothing(family):
    model = model_of(family).double()
    before = call(model)
    for fold in find_folds(model, select(model).linears, lambda: call(model)):
        source = model.get_submodule(fold.source)
        factor = torch.rand(int(fold.channels.max()) + 1).double() * 20 + 0.05
        besides = 1.0
        if isinstance(source, nn.Linear):
            source.weight.div_(factor[:, None])
            if source.bias is not None:
                source.bias.div_(factor)
        else:
            parameters, besides = folded_norm(source, factor)
            for name, value in parameters.items():
                source.get_parameter(name).copy_(value)
            assert (family == "Gemma2") == (besides != 1)
        for name in fold.readers:
            model.get_submodule(name).weight.mul_(factor[fold.channels] * besides)
    # Norms of some families compute in float32.
    torch.testing.assert_close(call(model), before, rtol=0, atol=1e-5)


class Mixture(nn.Module):
    """A norm that linears read, and a router."""

    def __init__(self, routed: bool):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 4)
        self.router = nn.Parameter(torch.randn(4, 8))
        self.routed = routed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        gate = (x @ self.router.t()).softmax(-1) if self.routed else 1.0
        return self.up(x) * gate


@pytest.mark.parametrize("routed", [False, True])
def test_a_norm_that_others_read_takes_none(routed):
    torch.manual_seed(0)
    model, x = Mixture(routed), torch.randn(5, 8)
    found = find_folds(model, {"up": model.up}, lambda: model(x))
    assert [fold.source for fold in found] == ([] if routed else ["norm"])


class Looking(nn.Module):
    """A norm that linears read, and that something else reads for images alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.look = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, sees: int) -> torch.Tensor:
        x = self.norm(x)
        return self.up(x) + self.look(x) if sees else self.up(x)


@pytest.mark.parametrize("sees", [False, True])
def test_samples_of_every_modality_are_looked_at(sees):
    torch.manual_seed(0)
    samples = (
        {"x": torch.randn(1, 80, 8), "sees": s, "modality_ids": torch.full((1, 80), s)}
        for s in (0, int(sees))
    )
    recipe = calibrate(
        Looking(),
        samples,
        include="up",
        modalities=("text", "vision") if sees else ("text",),
        scheme="w8a8",
        target="compressed-tensors",
    )
    is_smoothed = bool((recipe.layers["up"].smoothing_factor != 1).any())
    assert is_smoothed != sees
    assert recipe.description["samples"] == 2


def test_heads_that_share_their_values_share_factors():
    """And each token meets what calibration rounded for, whatever its modality."""
    recipe = recipe_of(qwen25_vl(layers=1), scheme="w8a8", target="compressed-tensors")
    layers = {name.rpartition(".")[2]: layer for name, layer in recipe.layers.items()}
    of_heads = layers["o_proj"].smoothing_factor.view(2, 2, 16)
    assert torch.equal(of_heads[:, 0], of_heads[:, 1])
    assert len(of_heads.unique()) == 32
    for layer in layers.values():
        assert layer.smoothing_factor.shape[0] == 1
        assert set(layer.tensors()) == {"smoothing_factor", "qdata", "scale"}


def test_what_nothing_can_take_is_rounded_without_a_factor(caplog):
    model = qwen25_vl(layers=1)
    mlp = model.model.language_model.layers[0].mlp
    # No name that is known.
    mlp.add_module("last", mlp.down_proj)
    mlp.forward = lambda x: mlp.last(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    del mlp.down_proj
    recipe = recipe_of(model, scheme="w8a8", target="compressed-tensors")
    factors = {n: layer.smoothing_factor for n, layer in recipe.layers.items()}
    plain = [n for n, factor in factors.items() if (factor == 1).all()]
    assert plain == ["model.language_model.layers.0.mlp.last"]
    assert "1 of 7 linears are rounded without a smoothing factor" in caplog.text
