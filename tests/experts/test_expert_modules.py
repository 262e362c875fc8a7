# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Quantized experts, of every layout of transformers."""

import copy
import pickle
from functools import cache

import pytest
import torch
from expert_models import LAYOUTS, NAMES, E, H, MoEModel, sample, samples
from expert_oracle import check_experts, recorded_experts
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantExperts,
    calibrate,
    masquant_config,
    token_modalities,
)
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.models.experts import experts_of
from torchao_masquant.routing import Router
from torchao_masquant.tensor_subclasses import MASQuantTensor

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def quantized(layout: str = "gated", scheme: str = "w4a8", **options) -> MoEModel:
    """A model of the caller's own."""
    return copy.deepcopy(_quantized(layout, scheme, **options))


@cache
def _quantized(layout: str, scheme: str, **options) -> MoEModel:
    model = MoEModel(layout)
    options = {"alpha": 0.5, "separation": 1.0, **options}
    if options.get("method") in ("rtn", "smoothquant", "masquant-paper"):
        options.pop("separation")
    recipe = calibrate(
        model, samples(), scheme=scheme, modalities=NAMES, progress=False, **options
    )
    quantize_(model, masquant_config(recipe))
    return model


@every_layout
@torch.no_grad()
def test_sorted_by_expert_is_what_transformers_computes(layout):
    """In float64, by the path that calibration observes."""
    model = MoEModel(layout).double()
    x, ids = sample(7)["x"].double(), sample(7)["modality_ids"]
    wanted = model(x)
    router = Router(NAMES)
    session = CalibrationSession({}, router, False, experts_of(model))
    with session.observing(model), router.explicit(ids):
        found = model(x)
    # GPT-OSS rounds nothing, but transformers adds the experts up in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert type(model.experts) is LAYOUTS[layout]


@pytest.mark.parametrize(
    "layout, scheme",
    [(layout, "w4a8") for layout in LAYOUTS]
    + [("gated", scheme) for scheme in ("w8a8", "w4a6", "w4a16")]
    + [("transposed", "w4a4"), ("transposed", "w4a16")],
)
@torch.no_grad()
def test_every_step_is_what_modalities_and_experts_ask_for(layout, scheme):
    group_size = 8 if scheme == "w4a16" else None
    model = quantized(layout, scheme, group_size=group_size)
    for ids in (sample(8)["modality_ids"], torch.zeros(1, 60, dtype=torch.int64)):
        with recorded_experts(model) as calls, token_modalities(model, ids):
            model(sample(8, ids=ids)["x"])
        assert len(calls) == 1
        check_experts(calls[0], ids)


@pytest.mark.parametrize("method", ["masquant", "masquant-paper", "smoothquant", "rtn"])
@torch.no_grad()
def test_methods(method):
    model = quantized(method=method)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(model.experts, name).data
        assert isinstance(weight, MASQuantTensor) and weight.shape[0] == E
        assert weight.qdata.dtype == torch.uint8
        # As published, what comes after the activation function is only rounded.
        is_spared = method == "masquant-paper" and name == "down_proj"
        routed = method.startswith("masquant") and not is_spared
        assert weight.is_routed == routed
        assert (weight.modality_bias is not None) == (method == "masquant")
        assert bool(weight.ranks) == routed
    ids = sample(8)["modality_ids"]
    with recorded_experts(model) as calls, token_modalities(model, ids):
        model(sample(8)["x"])
    check_experts(calls[0], ids)


def call_experts(model: MoEModel, chosen: torch.Tensor, ids: torch.Tensor):
    """One call of the experts alone, recorded."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(chosen.shape[0], H, generator=generator)
    weights = torch.rand(chosen.shape, generator=generator)
    with recorded_experts(model) as calls, token_modalities(model, ids):
        y = model.experts(x, chosen, weights)
    (call,) = calls
    assert y.shape == x.shape and y.isfinite().all()
    return call


@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 2], [2, 0], [0, 2]],
        [[3]],
        [[1, 1], [1, 1]],
        [[0, 1, 2, 3], [3, 2, 1, 0]],
        [[0, E], [E, 1], [E, E]],
    ],
    ids=[
        "experts without tokens",
        "one token of one expert",
        "an expert chosen twice",
        "all experts of a token",
        "experts elsewhere",
    ],
)
@torch.no_grad()
def test_choices_of_experts(chosen):
    for layout in ("gated", "transposed"):
        model = quantized(layout, "w4a4")
        experts = torch.tensor(chosen)
        ids = torch.arange(experts.shape[0]) % 3
        check_experts(call_experts(model, experts, ids), ids)


@torch.no_grad()
def test_no_token():
    model = quantized()
    empty = torch.empty(0, 2, dtype=torch.int64)
    y = call_experts(model, empty, torch.empty(0, dtype=torch.int64)).y
    assert y.shape == (0, H)


@torch.no_grad()
def test_a_modality_that_meets_some_experts_alone():
    model = quantized("gated", "w4a4")
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 0]])
    ids = torch.tensor([0, 2, 0, 1])
    check_experts(call_experts(model, chosen, ids), ids)


@torch.no_grad()
def test_base_tokens_do_no_low_rank_work(monkeypatch):
    model = quantized()
    seen = []
    original = torch.ops.masquant.expert_int_linear

    def spy(*args):
        seen.append((args[5], args[6], args[8]))
        return original(*args)

    monkeypatch.setattr(torch.ops.masquant, "expert_int_linear", spy)
    x = sample(3)["x"]
    with token_modalities(model, torch.zeros(1, 60, dtype=torch.int64)):
        model(x)
    assert seen == [(None, None, None)] * 2
    seen.clear()
    with token_modalities(model, sample(3)["modality_ids"]):
        model(x)
    assert len(seen) == 2 and all(part is not None for parts in seen for part in parts)


@torch.no_grad()
def test_tokens_of_unknown_modality_are_refused():
    model = quantized()
    hidden = torch.randn(3, H)
    with pytest.raises(RuntimeError, match="^experts: the modality of its tokens"):
        model.experts(hidden, *model.choices(hidden))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["gated", "transposed"])
def test_compiled_in_one_graph_whatever_the_experts(layout):
    torch._dynamo.reset()
    model = quantized(layout)
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, tokens in ((5, 60), (6, 47), (7, 33)):
        mixed = sample(seed, tokens)
        with token_modalities(model, mixed["modality_ids"]):
            torch.testing.assert_close(compiled(mixed["x"]), model(mixed["x"]))
    # Not how often the backend was called: a float of GPT-OSS makes Dynamo start anew.
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model = quantized()
    compiled = torch.compile(model.experts, fullgraph=True, dynamic=True)
    for tokens in (12, 7):
        hidden = torch.randn(tokens, H, generator=torch.Generator().manual_seed(0))
        chosen, weights = model.choices(hidden)
        with token_modalities(model, torch.arange(tokens) % 3):
            wanted = model.experts(hidden, chosen, weights)
            found = compiled(hidden, chosen, weights)
        # An embedding that differs by 1e-7 gets another integer between the two.
        assert (
            nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
            > 0.999
        )


@torch.no_grad()
@pytest.mark.parametrize("layout", ["gated", "transposed"])
def test_copies_compute_the_same(layout):
    model = quantized(layout)
    mixed = sample(4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.experts, MASQuantExperts)
        assert isinstance(other.experts, LAYOUTS[layout])
        with (
            token_modalities(model, mixed["modality_ids"]),
            token_modalities(other, mixed["modality_ids"]),
        ):
            assert torch.equal(other(mixed["x"]), model(mixed["x"]))


def test_it_stays_what_it_was_and_prints_what_it_is():
    model = quantized()
    assert isinstance(model.experts, LAYOUTS["gated"])
    assert set(dict(model.experts.named_parameters())) == {"gate_up_proj", "down_proj"}
    shown = repr(model.experts)
    assert shown.startswith("MASQuantExperts(") and "w4a8" in shown
    assert "ranks={'vision': 2, 'audio': 2}" in shown


def test_a_projection_alone_is_refused():
    model = MoEModel()
    weight = MASQuantTensor.stack(
        [MASQuantTensor.from_hp(w) for w in model.experts.down_proj]
    )
    with pytest.raises(ValueError, match="experts are quantized as a whole"):
        MASQuantExperts.from_float(
            model.experts, {"down_proj": weight}, "experts", None
        )
    assert type(model.experts) is LAYOUTS["gated"]


def test_projections_for_different_modalities_are_refused():
    model, other = quantized(), quantized()
    weights = {
        "gate_up_proj": model.experts.gate_up_proj.data,
        "down_proj": other.experts.down_proj.data,
    }
    weights["down_proj"].modalities = NAMES[::-1]
    with pytest.raises(ValueError, match="^experts: .* for the same modalities, got"):
        MASQuantExperts.from_float(
            MoEModel().experts, weights, "experts", model.experts.router
        )
