# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which of vLLM's layers are quantized, by what a folder's config.json says."""

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
    ],
    ids=[
        "as it is",
        "a decoder that vLLM has elsewhere",
        "a decoder that was renamed halfway",
        "a head",
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


def test_a_newer_format_is_refused():
    entry = CheckpointFormat(
        "float32", {"a": LayerFormat.of(MASQuantTensor.from_hp(torch.randn(8, 16)))}
    ).to_json()
    with pytest.raises(ValueError, match="reads 1 to 4: upgrade it"):
        MASQuantVllmConfig.from_config({**entry, "format_version": 99})
