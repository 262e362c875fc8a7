# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which of vLLM's layers are quantized, by what a folder's config.json says."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from torchao_masquant.integrations.checkpoint_format import CheckpointFormat
from torchao_masquant.integrations.layer_format import LayerFormat
from torchao_masquant.tensor_subclasses import MASQuantTensor

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    UnquantizedLinearMethod,
)

from torchao_masquant.vllm_plugin import quantization  # noqa: E402
from torchao_masquant.vllm_plugin.linear_method import (  # noqa: E402
    MASQuantLinearMethod,
)
from torchao_masquant.vllm_plugin.quantization import (  # noqa: E402
    MASQuantVllmConfig,
)

_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def config(*names: str) -> MASQuantVllmConfig:
    known = LayerFormat.of(MASQuantTensor.from_hp(torch.randn(8, 16)))
    entry = CheckpointFormat("float32", dict.fromkeys(names, known)).to_json()
    found = MASQuantVllmConfig.from_config(entry)
    found.packed_modules_mapping.update(_PACKED)
    return found


def method(of: MASQuantVllmConfig, prefix: str):
    return of.get_quant_method(
        ColumnParallelLinear.__new__(ColumnParallelLinear), prefix
    )


@pytest.mark.parametrize(
    "saved, prefix",
    [
        ("model.layers.0.o_proj", "model.layers.0.o_proj"),
        (
            "model.language_model.layers.0.o_proj",
            "language_model.model.layers.0.o_proj",
        ),
        (
            # As vLLM's mapping for files leaves what transformers 5.21 and newer save.
            "language_model.model.language_model.layers.0.o_proj",
            "language_model.model.layers.0.o_proj",
        ),
        ("lm_head", "language_model.lm_head"),
        ("model.layers.0.o_proj", "draft_model.model.layers.0.o_proj"),
    ],
    ids=[
        "as it is",
        "a decoder that vLLM has elsewhere",
        "a decoder that was renamed halfway",
        "a head",
        "a model that drafts",
    ],
)
def test_a_layer_is_found_by_its_name(saved, prefix):
    found = method(config(saved), prefix)
    assert isinstance(found, MASQuantLinearMethod) and list(found.formats) == [saved]


def test_shards_of_a_merged_layer_are_found_in_order():
    names = [f"model.layers.0.{name}" for name in ("v_proj", "q_proj", "k_proj")]
    found = method(config(*names), "model.layers.0.qkv_proj")
    assert [n[-6:] for n in found.formats] == ["q_proj", "k_proj", "v_proj"]


def test_other_layers_are_vllms_own():
    of = config("model.layers.0.o_proj")
    assert isinstance(method(of, "visual.blocks.0.o_proj"), UnquantizedLinearMethod)
    assert of.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_what_is_half_quantized_is_refused():
    of = config("model.layers.0.q_proj", "model.layers.0.v_proj")
    with pytest.raises(
        ValueError, match=r"of which \['model.layers.0.k_proj'\] are not"
    ):
        method(of, "model.layers.0.qkv_proj")


def test_what_is_no_linear_of_vllms_is_refused():
    of = config("lm_head")
    with pytest.raises(ValueError, match="vLLM's Embedding there is none"):
        of.get_quant_method(torch.nn.Embedding(2, 2), "lm_head")


def of_latent_attention(yes: bool):
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(use_mla=yes))
    return mock.patch.object(
        quantization, "get_current_vllm_config", lambda: vllm_config
    )


def test_what_latent_attention_multiplies_is_refused():
    of = config("model.layers.0.self_attn.kv_b_proj")
    with of_latent_attention(True):
        with pytest.raises(ValueError, match="exclude='[*].kv_b_proj'"):
            method(of, "model.layers.0.self_attn.kv_b_proj")
    with of_latent_attention(False):
        found = method(of, "model.layers.0.self_attn.kv_b_proj")
    assert isinstance(found, MASQuantLinearMethod)


def test_a_newer_format_is_refused():
    entry = CheckpointFormat(
        "float32", {"a": LayerFormat.of(MASQuantTensor.from_hp(torch.randn(8, 16)))}
    ).to_json()
    with pytest.raises(ValueError, match="reads 1 to 6: upgrade it"):
        MASQuantVllmConfig.from_config({**entry, "format_version": 99})


def test_quantized_towers_are_refused():
    weight = MASQuantTensor.from_hp(torch.randn(8, 16), modalities=("vision",))
    layers = {"visual.blocks.0.attn.qkv": LayerFormat.of(weight)}
    message = "1 linears of the checkpoint's towers .*runs towers in high precision"
    with pytest.raises(ValueError, match=message):
        MASQuantVllmConfig.from_config(CheckpointFormat("float32", layers).to_json())


def routed(asked: dict[str, int], *, sees: bool = True) -> None:
    """Let vLLM ask for a layer of a checkpoint that treats modalities differently."""
    weight = MASQuantTensor.from_hp(
        torch.randn(8, 16),
        modalities=("text", "vision"),
        smoothing_factor=torch.rand(2, 16) + 0.5,
    )
    entry = CheckpointFormat("float32", {"a.o_proj": LayerFormat.of(weight)}).to_json()
    usual = {
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
    }
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(**usual | asked),
        model_config=SimpleNamespace(multimodal_config=None),
    )
    named = {"supports_multimodal": sees, "load_weights": print}
    model_class = type("Reader", (), named)
    of = MASQuantVllmConfig.from_config(entry)
    of.maybe_update_config("", SimpleNamespace(architectures=["Reader"]))
    with (
        mock.patch.object(quantization, "get_current_vllm_config", lambda: vllm_config),
        mock.patch.object(
            quantization, "modality_token_ids", lambda _: {"text": (), "vision": (3,)}
        ),
        mock.patch.object(
            quantization.ModelRegistry,
            "resolve_model_cls",
            lambda *_, **__: (model_class, ""),
        ),
    ):
        method(of, "a.o_proj")


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"pipeline_parallel_size": 2}, "use pipeline_parallel_size=1"),
        ({"prefill_context_parallel_size": 2}, "use prefill_context_parallel_size=1"),
        ({"use_ubatching": True}, "leave out --enable-dbo and --ubatch-size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_where_layers_cannot_tell_their_tokens(asked, said):
    with pytest.raises(ValueError, match=said):
        routed(asked)


def test_a_model_that_takes_text_alone_is_refused():
    with pytest.raises(ValueError, match="vLLM's Reader takes text alone"):
        routed({}, sees=False)


@pytest.mark.parametrize("stages, missing", [(1, 2), (2, 1)])
def test_each_stage_looks_for_its_own_layers(stages, missing):
    of = config("model.layers.0.mlp.o_proj", "model.layers.1.mlp.o_proj")
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(get_layers_start_end_indices=lambda _: (1, 2)),
    )
    with mock.patch.object(
        quantization, "get_current_vllm_config", lambda: vllm_config
    ):
        with pytest.raises(ValueError, match=f"no place for {missing} quantized"):
            of.check_claimed()


def test_a_release_that_was_not_tried_is_warned_of():
    with mock.patch.object(quantization, "vllm_version", "0.40.1"):
        with pytest.warns(UserWarning, match="tried with vLLM 0.32, this is 0.40.1"):
            quantization.register_config()
