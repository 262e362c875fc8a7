# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Real model classes of many families: selected, calibrated, routed, generated, compiled.

What is expected of each is written in ``families.py``, and shown in docs/families.md.
"""

import contextlib
import copy
import dataclasses
import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Iterator, Optional

import families_table
import pytest
import torch
import transformers
from expert_oracle import check_experts, recorded_experts
from expert_oracle import experts_of as quantized_experts_of
from families import AUDIO, FAMILIES, IMAGE, REFUSED, Family
from linear_oracle import LinearCall, assert_routed, linears_of, recorded
from refusals import refused
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchao.quantization import quantize_

from torchao_masquant import (
    MASQuantConfig,
    MASQuantTensor,
    Router,
    calibrate,
    masquant_config,
)
from torchao_masquant.modality import modality_token_ids
from torchao_masquant.models.experts import expert_weights
from torchao_masquant.options import get_scheme
from torchao_masquant.selection import select

# Tokens that a random model must not generate: an image or a sound that is not there.
_NOT_WORDS = [*range(10), *range(64, 80)]

# Their decoders are of classes that other families' are, which more is asked of.
DECODED_BY_ANOTHERS_CLASS = {
    "Qwen2-Audio": "LLaVA-OneVision",
    "InternVL": "LLaVA-OneVision",
    "SmolVLM": "Voxtral",
    "Idefics3": "Voxtral",
    "Llama": "Voxtral",
    "Pixtral": "Mistral 3",
}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@dataclass
class Quantized:
    """A family's model before and after."""

    family: Family
    dense: Any
    model: Any

    @property
    def router(self) -> Optional[Router]:
        return next(m.router for m in linears_of(self.model).values())


@torch.no_grad()
def quantize(family: Family, scheme: str, samples: int, **options: Any) -> Quantized:
    dense, model = family.model(), family.model()
    data = [family.mixed(seed) for seed in range(1, samples + 1)]
    recipe = calibrate(model, data, scheme=scheme, progress=False, **options)
    quantize_(model, masquant_config(recipe))
    return Quantized(family, dense, model)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def w4a8(request):
    return quantize(request.param, "w4a8", 2, alpha=0.5, separation=1.0)


def family_is_multimodal(family: Family) -> bool:
    return len(family.modalities) > 1


@every_family
def test_placeholders_linears_and_experts_are_found(family):
    """All that are the decoder's, and no other."""
    model = family.model()
    found = modality_token_ids(model.config)
    assert found == dict(family.modalities)
    assert list(found) == list(family.modalities)
    selected = select(model)
    assert set(selected.linears) == family.linears
    assert set(selected.experts) == {
        f"{name}.{projection}"
        for name in family.experts
        for projection in ("gate_up_proj", "down_proj")
    }
    assert bool(expert_weights(model)) == family.has_experts
    everything = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # The towers, and what is left out by name.
    assert bool(everything - family.linears - {"lm_head"}) == bool(family.runs)


def test_what_is_quantized(w4a8):
    quantized = linears_of(w4a8.model)
    assert quantized.keys() == w4a8.family.quantized
    modalities = tuple(w4a8.family.modalities)
    for linear in quantized.values():
        weight = linear.weight.data
        assert (weight.weight_bits, weight.act_bits) == (4, 8)
        assert weight.modalities == modalities
        # A pair for each modality but the base, where 5 % of its size is at least one.
        if min(weight.shape) >= 20:
            assert len(weight.ranks) == len(modalities) - 1 and all(weight.ranks)
        assert linear.routed == family_is_multimodal(w4a8.family)
    experts = quantized_experts_of(w4a8.model)
    assert experts.keys() == w4a8.family.experts
    for module in experts.values():
        for weight in (module.gate_up_proj.data, module.down_proj.data):
            assert (weight.weight_bits, weight.act_bits) == (4, 8)
            assert weight.qdata.dtype == torch.uint8 and weight.shape[0] == 4
            assert weight.modalities == modalities
            assert len(weight.ranks) == len(modalities) - 1 and all(weight.ranks)
    assert type(w4a8.model.get_output_embeddings()) is nn.Linear


@contextlib.contextmanager
def ids_given(router: Optional[Router]) -> Iterator[list[Optional[torch.Tensor]]]:
    """What the linears are given as ids, call by call."""
    given: list[Optional[torch.Tensor]] = []
    original = router.ids_for

    def ids_for(name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
        ids = original(name, x)
        given.append(ids)
        return ids

    router.ids_for = ids_for
    try:
        yield given
    finally:
        del router.ids_for


@contextlib.contextmanager
def recorded_apart(model: nn.Module) -> Iterator[list[LinearCall]]:
    """The calls of the linears; Gemma 3n writes into what a linear gives it."""
    with recorded(model) as calls, contextlib.ExitStack() as stack:
        for linear in linears_of(model).values():
            stack.enter_context(linear.register_forward_hook(lambda *a: a[-1].clone()))
        yield calls


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["mixed", "text", "padded"])
def test_every_linear_computes_what_its_tokens_modalities_ask_for(w4a8, prompt):
    """Held to a float64 emulation, linear by linear; text alone is given no ids."""
    family, inputs = w4a8.family, getattr(w4a8.family, prompt)(seed=5)
    readers = len(family.quantized) + len(family.experts)
    asked = readers if family_is_multimodal(family) else 0
    with (
        recorded_apart(w4a8.model) as calls,
        recorded_experts(w4a8.model) as mixtures,
        ids_given(w4a8.router) as given,
    ):
        logits = w4a8.model(**inputs).logits
    ids = family.ids(inputs)
    assert (ids != 0).any() == (bool(asked) and prompt != "text")
    assert len(given) == asked
    for found in given:
        assert (
            found is None
            if prompt == "text"
            else torch.equal(found.reshape(ids.shape), ids)
        )
    assert {call.name for call in mixtures} == family.experts
    for call in mixtures:
        check_experts(call, ids)
    assert_routed(calls, ids, linears=len(family.quantized))
    assert logits.isfinite().all()


@torch.no_grad()
def test_generate(w4a8):
    family = w4a8.family
    inputs = family.mixed(seed=4)
    shape = inputs["input_ids"].shape
    vocabulary = w4a8.model.get_output_embeddings().out_features
    with recorded_apart(w4a8.model) as calls, recorded_experts(w4a8.model) as mixtures:
        tokens = w4a8.model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            suppress_tokens=[t for t in _NOT_WORDS if t < vocabulary],
        )
    assert tokens.shape == (1, shape[1] + 4)
    # One prefill, and three steps of one token of text.
    count = len(family.quantized)
    assert_routed(calls[:count], family.ids(inputs))
    assert_routed(calls[count:], torch.zeros(1, 1, dtype=torch.int64), 3 * count)
    count = len(family.experts)
    assert len(mixtures) == 4 * count
    for index, call in enumerate(mixtures):
        prefill = index < count
        check_experts(
            call, family.ids(inputs) if prefill else torch.zeros(1, dtype=torch.int64)
        )
    assert w4a8.router is None or not w4a8.router.call.known


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f.name not in DECODED_BY_ANOTHERS_CLASS],
    ids=lambda f: f.name,
)
@torch.no_grad()
def test_eight_bits_are_close_to_dense(family):
    """On prompts that calibration has not seen."""
    # Enough for the pairs to be of more than the samples: the inputs are 64 wide.
    both = quantize(family, "w8a8", 24)
    for inputs in (family.mixed(seed=99), family.text(seed=99)):
        found, wanted = both.model(**inputs).logits, both.dense(**inputs).logits
        assert found.isfinite().all()
        assert cosine(found, wanted) > 0.99


@pytest.mark.parametrize("scheme, least", [("fp8", 0.99), ("nvfp4", 0.9)])
@torch.no_grad()
def test_experts_in_floats(scheme, least, tmp_path):
    both = quantize(named("Qwen3-VL-MoE"), scheme, 24, rank=2)
    weights = [w for w in both.model.parameters() if w.dim() == 3 and w.numel()]
    assert {w.act_format for w in weights if isinstance(w, MASQuantTensor)} == {
        get_scheme(scheme).act_format
    }
    both.model.save_pretrained(tmp_path)
    loaded = type(both.model).from_pretrained(tmp_path)
    for inputs in (both.family.mixed(seed=99), both.family.text(seed=99)):
        found, wanted = both.model(**inputs).logits, both.dense(**inputs).logits
        assert cosine(found, wanted) > least
        assert torch.equal(loaded(**inputs).logits, found)


@torch.no_grad()
def compare_compiled(both: Quantized, part: str, backend: Any) -> None:
    """Hold mixed calls of a model of which a part is compiled to the same without."""
    torch._dynamo.reset()
    model = copy.deepcopy(both.model)
    model.get_submodule(part).compile(fullgraph=True, dynamic=True, backend=backend)
    for seed in (5, 6):
        inputs = both.family.mixed(seed)
        found, wanted = model(**inputs).logits, both.model(**inputs).logits
        # Rounding flips: an embedding that differs by 1e-7 gets another integer.
        assert cosine(found, wanted) > 0.999


def test_decoders_of_one_class():
    for pair in DECODED_BY_ANOTHERS_CLASS.items():
        first, second = (
            type(named(name).model().get_submodule(named(name).decoder))
            for name in pair
        )
        assert first is second


@pytest.mark.parametrize(
    "w4a8",
    [f for f in FAMILIES if f.name not in DECODED_BY_ANOTHERS_CLASS],
    indirect=True,
    ids=lambda f: f.name,
)
def test_compiled_without_a_graph_break(w4a8):
    """One graph for all mixed calls; tests/routing has those of text alone.

    What Inductor makes of a graph, tests/demo has, and of experts, tests/experts.
    """
    decoder = w4a8.family.decoder
    whole = w4a8.family.compiles == "language model"
    model = copy.deepcopy(w4a8.model)
    language_model = model.get_submodule(decoder)
    types = getattr(language_model.config, "layer_types", None) or ()
    if len(set(w4a8.family.layers)) == 1 and len(set(types)) <= 1:
        # One of layers that are alike is traced in half the time.
        del language_model.layers[1:]
    one = dataclasses.replace(w4a8, model=model)
    counter = CompileCounter()
    compare_compiled(one, decoder if whole else f"{decoder}.layers.0", counter)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.compiles == "layer"], ids=lambda f: f.name
)
def test_what_does_not_compile_does_not_before_quantization_either(family):
    torch._dynamo.reset()
    model = family.model()
    model.get_submodule(family.decoder).compile(fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        model(**family.mixed())


@torch.no_grad()
def test_text_alone_needs_no_routing():
    both = quantize(named("Llama"), "w4a8", 2, alpha=0.5, separation=1.0)
    assert "forward" not in vars(both.model)
    inputs = both.family.text()
    embeds = both.model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(
        both.model(inputs_embeds=embeds).logits, both.model(**inputs).logits
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.has_experts])
def test_the_user_is_told_once_what_experts_of_another_layout_weigh(family, caplog):
    model = family.build()
    caplog.set_level(logging.WARNING, logger="torchao_masquant.models.experts")
    select(model)
    assert not caplog.records
    for name in family.experts:
        # Not marked by transformers.
        del model.get_submodule(name).is_transposed
    for _ in range(3):
        assert not select(model).experts
    (message,) = [r.getMessage() for r in caplog.records if "experts" in r.getMessage()]
    # 4 experts of (gate, up, down), 64 x 32 each, in each layer without a dense MLP.
    layers = sum("mlp.up_proj" not in names for names in family.layers)
    weights = expert_weights(model.get_submodule(family.decoder))
    numbers = sum(p.numel() for p in weights.values())
    assert numbers == layers * 4 * 3 * 64 * 32
    everything = sum(
        p.numel() for p in model.get_submodule(family.decoder).parameters()
    )
    assert f"{100 * numbers / everything:.1f} % of the decoder's bytes" in message


def test_what_is_left_out_by_name_can_be_included_by_name():
    model = named("Gemma 3n").build()
    assert not any("altup." in name for name in select(model).linears)
    chosen = select(model, include="*.0.altup.modality_router").linears
    assert list(chosen) == ["model.language_model.layers.0.altup.modality_router"]


def test_towers_inside_of_a_decoder_are_no_part_of_it():
    model = named("Phi-4-multimodal").build()
    assert not select(model).towers
    selected = select(model, include="*img_projection_up")
    assert selected.towers == dict.fromkeys(selected.linears, "vision") != {}


_REFUSAL = "models are not supported: its images reach the decoder through cross-atten"


@pytest.mark.parametrize("config", REFUSED)
def test_cross_attention_is_refused(config):
    with refused(f"^'{config.model_type}' {_REFUSAL}"):
        modality_token_ids(config())


def test_a_model_with_cross_attention_is_refused_and_left_alone():
    """As its config says, whatever is in it."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.config = transformers.MllamaConfig()
    with refused(f"^'mllama' {_REFUSAL}"):
        calibrate(model, [{"input": torch.ones(1, 4)}], include="0", progress=False)
    for step in ("prepare", "prepare_for_loading"):
        with refused(f"^'mllama' {_REFUSAL}"):
            quantize_(model, MASQuantConfig(step=step, include="0"))
    assert type(model) is nn.Sequential and type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "config", [transformers.Florence2Config, transformers.T5Gemma2Config]
)
def test_an_encoder_with_images_is_refused_and_one_of_text_is_not(config):
    name = config.model_type
    with refused(
        f"^'{name}' models are not supported: its input_ids are the encoder's"
    ):
        modality_token_ids(config())
    assert modality_token_ids(transformers.T5Config()) == {"text": ()}


@pytest.mark.parametrize(
    "name, config",
    [("image", transformers.MiniCPMV4_6Config), ("audio", transformers.VoxtralConfig)],
)
def test_a_tower_without_a_placeholder_token_is_not_taken_for_text(name, config):
    with refused(rf"set model\.config\.{name}_token_id to"):
        modality_token_ids(config())
    config = config(**{f"{name}_token_id": 7})
    assert (7,) in modality_token_ids(config).values()


def test_a_towers_own_token_counts_only_where_the_model_names_none():
    tower = SimpleNamespace(image_token_id=IMAGE, audio_token_id=AUDIO)
    config = SimpleNamespace(vision_config=tower)
    assert modality_token_ids(config) == {"text": (), "vision": (IMAGE,)}
    config.image_token_id = 11
    assert modality_token_ids(config) == {"text": (), "vision": (11,)}


def test_the_page_of_families_is_up_to_date():
    assert families_table.PAGE.read_text() == families_table.page(), (
        "run python tests/integrations/families_table.py"
    )
