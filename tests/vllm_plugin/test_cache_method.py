# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What a layer of vLLM is given of a recipe, and which layers and recipes are refused."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from torchao_masquant import CacheRecipe
from torchao_masquant.kv_cache.cache_recipe import SharedLayer

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention import MLAAttention  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402

from torchao_masquant.vllm_plugin import cache_method  # noqa: E402
from torchao_masquant.vllm_plugin.cache_method import (  # noqa: E402
    MASQuantCacheMethod,
    cached_in_fp8,
    check_fits,
)

HEADS, WIDTH = 4, 32
_PREFIX = "model.layers.1.self_attn.attn"


class Layer(nn.Module):
    """Attends as vLLM's does, to all tokens of a call; what it is handed may be looked at."""

    def __init__(self, heads: int = HEADS, **known):
        super().__init__()
        self.num_kv_heads, self.num_heads = heads, 3 * heads
        self.head_size = WIDTH
        self.kv_cache_dtype, self.attn_type = "fp8", AttentionType.DECODER
        self.has_sink, self.kv_sharing_target_layer_name = False, None
        self.impl = SimpleNamespace(logits_soft_cap=0)
        for name in ("_k_scale", "_v_scale", "_q_scale", "_prob_scale"):
            self.register_buffer(name, torch.tensor(1.0))
        self._k_scale_cpu, self._v_scale_cpu = torch.ones(()), torch.ones(())
        self.__dict__.update(known)

    def forward(self, query, key, value, output_shape=None):
        self.handed = key, value
        q, k, v = (
            t.view(len(query), -1, WIDTH).transpose(0, 1) for t in (query, key, value)
        )
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found.transpose(0, 1).reshape(len(query), -1)


@contextlib.contextmanager
def one_of(pieces: int, rank: int = 0, layers: int = 2):
    """vLLM in one of so many processes, for a model of so many layers."""
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: layers)
    config = SimpleNamespace(additional_config={}, model_config=model)
    with mock.patch.multiple(
        cache_method,
        get_current_vllm_config=lambda: config,
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_world_size=lambda: pieces,
    ):
        yield config


@pytest.fixture(scope="module")
def recipe():
    generator = torch.Generator().manual_seed(0)
    shared = [
        SharedLayer(
            torch.randn(HEADS, WIDTH, generator=generator) * 10,
            torch.rand(HEADS, WIDTH, generator=generator) + 0.5,
            torch.tensor([5.0, 4.0]),
        )
        for _ in range(2)
    ]
    return CacheRecipe(("text",), [torch.zeros(1)] * 2, [torch.ones(1)] * 2, shared)


def given(recipe, layer, prefix=_PREFIX):
    """The layer, with what the recipe has for it."""
    method = MASQuantCacheMethod(mock.Mock(), recipe, layer, prefix)
    method.create_weights(layer)
    method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("keywords", [False, True])
def test_answers_stay_and_what_is_held_is_small(recipe, keywords):
    generator = torch.Generator().manual_seed(1)
    shared = recipe.shared[1]
    query = torch.randn(9, 3 * HEADS * WIDTH, generator=generator)
    key, value = torch.randn(2, 9, HEADS * WIDTH, generator=generator)
    key += shared.key_center.flatten()
    with one_of(1) as config:
        layer = given(recipe, Layer())
    # Graphs that were compiled without are not taken.
    assert config.additional_config
    asked = {"query": query, "key": key, "value": value}
    with mock.patch.object(cache_method, "_rounded", lambda rows, scale: rows):
        found = layer(**asked) if keywords else layer(*asked.values())
    torch.testing.assert_close(found, Layer()(*asked.values()), rtol=1e-4, atol=1e-4)
    exact_key, exact_value = layer.handed
    assert torch.equal(exact_value, value)
    small = (key.view(9, HEADS, WIDTH) - shared.key_center) / shared.key_factor
    norms = exact_key.view(9, HEADS, WIDTH).norm(dim=-1)
    # A root of two lies with the queries.
    torch.testing.assert_close(norms, small.norm(dim=-1) * 2**0.5)

    layer(*asked.values())
    scales = layer._k_scale_float, layer._v_scale_float
    assert scales == shared.fp8_scales == (2**-5, 2**-5)
    for handed, exact, scale in zip(layer.handed, (exact_key, exact_value), scales):
        held = (exact / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(handed, held)


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_are_exact_in_every_type(width, dtype):
    query, key = (r.to(dtype).double() for r in cache_method._rotations(width))
    assert torch.equal(query @ key.T, torch.eye(width, dtype=torch.float64))


def test_scales_have_room_for_twice_the_largest(recipe):
    far = recipe.shared[0]._replace(largest=torch.tensor([448.0, 0.0]))
    key, value = far.fp8_scales
    assert key == 2 and 0 < value < 1


@pytest.mark.parametrize(
    "pieces, rank, heads",
    [(2, 1, [2, 3]), (4, 2, [2]), (8, 5, [2]), (2, 1, [0, 1, 2, 3])],
)
def test_each_process_has_its_heads(recipe, pieces, rank, heads):
    with one_of(pieces, rank):
        layer = given(recipe, Layer(len(heads)))
    shared = recipe.shared[1]
    assert torch.equal(layer.masquant_key_center, shared.key_center[heads])
    queries = shared.key_factor[heads].repeat_interleave(3, 0)
    assert torch.equal(layer.masquant_query_factor, queries)


@pytest.mark.parametrize(
    "known, said",
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "with a cache of fp8_e5m2 .fp8 is."),
        ({"has_sink": True}, "with attention sinks"),
        ({"impl": SimpleNamespace(logits_soft_cap=30)}, "with a soft cap"),
        ({"kv_sharing_target_layer_name": "other"}, "with another layer's cache"),
        (
            {"head_size": 64},
            "4 heads of 32 channels, and vLLM's layer has 4 of 64",
        ),
        ({"num_kv_heads": 3}, "vLLM's layer has 3 of 32: it is another model's"),
    ],
)
def test_layers_that_it_does_not_fit(recipe, known, said):
    with one_of(1), pytest.raises(ValueError, match=said):
        given(recipe, Layer(**known))


def test_latent_attention_is_refused(recipe):
    layer = MLAAttention.__new__(MLAAttention)
    with one_of(1), pytest.raises(ValueError, match="vLLM caches latent vectors"):
        MASQuantCacheMethod(mock.Mock(), recipe, layer, _PREFIX)


def test_recipes_that_do_not_fit(recipe):
    with one_of(1, layers=3), pytest.raises(ValueError, match="of 2 layers, and its"):
        check_fits(recipe)
    old = CacheRecipe(recipe.modalities, recipe.centers, recipe.factors)
    with one_of(1), pytest.raises(ValueError, match="before vLLM was given any"):
        check_fits(old)
    with one_of(1), pytest.raises(ValueError, match="has 2 layers, and none for this"):
        given(recipe, Layer(), "model.layers.2.self_attn.attn")


def test_only_what_is_held_in_fewer_bits_for_later_steps():
    assert cached_in_fp8(Layer()) and not cached_in_fp8(Layer(kv_cache_dtype="auto"))
    assert not cached_in_fp8(Layer(attn_type=AttentionType.ENCODER_ONLY))
