# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM's cache in fp8: keys have a centre taken off, are divided by factors and rotated.

Where all tokens of a head have one centre, an attention of any kind takes part without being
told: a query's products with keys all change by the same, of which their softmax does not
depend. Queries are multiplied by what keys are divided by, and rotated with them. Values stay
as they are: that of a token that most attend to, and learn nothing of, is next to zero, and
would not be less a centre.
"""

from typing import Any, Mapping, Union

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType

from torchao_masquant.kv_cache import CacheRecipe
from torchao_masquant.kv_cache.cache_recipe import SharedLayer
from torchao_masquant.kv_cache.rounded_tokens import rotation

__all__ = ["MASQuantCacheMethod", "cached_in_fp8", "check_fits"]

#: vLLM's names of e4m3.
_E4M3 = ("fp8", "fp8_e4m3")

_LARGEST = torch.finfo(torch.float8_e4m3fn).max

#: Of ``Attention.forward``, in their order.
_ARGUMENTS = ("query", "key", "value", "output_shape", "output_dtype")

AnyAttention = Union[Attention, MLAAttention]


def cached_in_fp8(layer: AnyAttention) -> bool:
    """Whether a layer holds what it attends to in fewer bits than it computes in."""
    kind = getattr(layer, "attn_type", AttentionType.DECODER)
    # Others hold nothing for later steps.
    return kind == AttentionType.DECODER and is_quantized_kv_cache(layer.kv_cache_dtype)


def check_fits(recipe: CacheRecipe) -> None:
    """Raise where a folder's cache recipe is not for its model.

    Raises:
        ValueError: it is another model's, or of an earlier version.
    """
    found = get_current_vllm_config().model_config.get_total_num_hidden_layers()
    if found != len(recipe.centers):
        raise ValueError(
            f"the folder's cache recipe is of a decoder of {len(recipe.centers)} layers, "
            f"and its model has {found}: it is another model's."
        )
    if not recipe.shared:
        raise ValueError(
            "the folder's cache recipe was written before vLLM was given any: make it again "
            "with calibrate_cache."
        )


class MASQuantCacheMethod(BaseKVCacheMethod):
    """Gives one layer's cache its centres and scales.

    Args:
        config: of the checkpoint.
        recipe: of the folder.
        layer: of vLLM.
        prefix: its name.

    Raises:
        ValueError: the recipe does not fit the layer, or the layer attends in a way to
            which a centre would make a difference.
    """

    def __init__(
        self,
        config: QuantizationConfig,
        recipe: CacheRecipe,
        layer: AnyAttention,
        prefix: str,
    ):
        super().__init__(config)
        index = extract_layer_index(prefix)
        if index >= len(recipe.shared):
            raise ValueError(
                f"{prefix}: the folder's cache recipe has {len(recipe.shared)} layers, and "
                "none for this one: run without --kv-cache-dtype, or without the recipe."
            )
        _check_attends(layer, prefix)
        self._shared = _of_process(recipe.shared[index], layer, prefix)

    def create_weights(self, layer: Any) -> None:
        """Put what keys, queries and values go through before the attention."""
        super().create_weights(layer)
        shared, queries = self._shared, layer.num_heads // layer.num_kv_heads
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        query_rotation, key_rotation = _rotations(layer.head_size)
        buffers = {
            "query_factor": shared.key_factor.repeat_interleave(queries, 0),
            "key_factor": shared.key_factor,
            "key_center": shared.key_center,
            "query_rotation": query_rotation,
            "key_rotation": key_rotation,
        }
        for name, tensor in buffers.items():
            # A centre in this type is another, of all tokens like the first.
            own = tensor.to(device, dtype)
            layer.register_buffer(f"masquant_{name}", own, persistent=False)
        layer.register_forward_pre_hook(_before, with_kwargs=True)
        told = get_current_vllm_config().additional_config
        if isinstance(told, dict):
            # vLLM keeps compiled graphs by what it is configured to do, and this changes
            # them.
            told["masquant_kv_cache"] = True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Set the scales, as if a checkpoint had had them."""
        key, value = self._shared.fp8_scales
        layer.k_scale.data.fill_(key)
        layer.v_scale.data.fill_(value)
        super().process_weights_after_loading(layer)


def _check_attends(layer: AnyAttention, prefix: str) -> None:
    """Raise where a centre would make a difference, or scales are not known."""
    if isinstance(layer, MLAAttention):
        raise ValueError(
            f"{prefix}: the folder's cache recipe is of keys, and vLLM caches latent vectors "
            "(MLA): set VLLM_MLA_DISABLE=1, or run without --kv-cache-dtype."
        )
    reasons = {
        f"a cache of {layer.kv_cache_dtype} (fp8 is)": layer.kv_cache_dtype
        not in _E4M3,
        "attention sinks": layer.has_sink,
        "a soft cap": bool(getattr(layer.impl, "logits_soft_cap", 0)),
        "another layer's cache": layer.kv_sharing_target_layer_name is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"{prefix}: the folder's cache recipe is not served with {' and '.join(found)}: "
            "run with another --kv-cache-dtype, or without the recipe."
        )


def _of_process(shared: SharedLayer, layer: Attention, prefix: str) -> SharedLayer:
    """That of the heads that one of several processes has.

    Raises:
        ValueError: the layer has others.
    """
    heads, width = shared.key_center.shape
    rank, pieces = (
        get_tensor_model_parallel_rank(),
        get_tensor_model_parallel_world_size(),
    )
    mine = layer.num_kv_heads
    if width != layer.head_size or mine not in (heads, max(1, heads // pieces)):
        raise ValueError(
            f"{prefix}: the folder's cache recipe is of {heads} heads of {width} channels, "
            f"and vLLM's layer has {mine} of {layer.head_size}"
            + (f" in each of {pieces} processes" if pieces > 1 else "")
            + ": it is another model's."
        )
    # Where there are more processes than heads, several have the same.
    first = 0 if mine == heads else rank * heads // pieces
    parts = {n: t[first : first + mine] for n, t in shared._asdict().items()}
    return shared._replace(**{**parts, "largest": shared.largest})


def _rotations(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(D, D) of queries and of keys, whose product is the identity in every type.

    Their numbers are powers of two: one root of a block's size would be rounded, and with it
    all products of queries and keys.
    """
    signs = rotation(width, torch.device("cpu")).sign()
    power = (width & -width).bit_length() - 1
    return signs / 2 ** (power - power // 2), signs / 2 ** (power // 2)


def _before(
    layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Make what the attention is given of queries, keys and values."""
    given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
    query, key, value = (given[n] for n in _ARGUMENTS[:3])
    width = layer.head_size
    query = query.reshape(-1, layer.num_heads, width) * layer.masquant_query_factor
    query = query @ layer.masquant_query_rotation
    key = key.reshape(-1, layer.num_kv_heads, width) - layer.masquant_key_center
    key = (key / layer.masquant_key_factor) @ layer.masquant_key_rotation
    found = {
        "query": query.flatten(1),
        "key": _rounded(key.flatten(1), layer._k_scale),
        "value": _rounded(value, layer._v_scale),
    }
    return (), {**given, **found}


def _rounded(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """To the nearest of e4m3, on CPUs: vLLM's kernel for them cuts off what is below."""
    if rows.device.type != "cpu":
        return rows
    held = (rows.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (held.float() * scale).to(rows.dtype)
